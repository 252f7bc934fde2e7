"""What the verbs share: the lock and the fence, events, counters, a unit's scans, and the end of a job.

Everything here is called inside a verb's transaction, with the job's row locked.
"""

import datetime as dt
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, all_, and_, func, insert, literal, select, update
from sqlalchemy.orm import Session

from jobs import prediction_counts, webhooks
from jobs.db import Prepared
from jobs.errors import LeaseLost
from jobs.prediction_counts import CLASS, DISPOSITION
from jobs.states import JobKind, ResultState, UnitState
from jobs.tables import Job, JobEvent, Json, ScanResult, Unit, new_id

UNITS_CHANNEL = "renalq_units"
"""NOTIFY channel: a unit waits for the dispatcher, or a worker is done with one."""
JOBS_CHANNEL = "renalq_jobs"
"""NOTIFY channel: the job whose id is the payload has changed. A trigger sends it."""

NOW = func.clock_timestamp()
PREDICTIONS = (JobKind.PREDICT, JobKind.PREDICT_BATCH)


@dataclass(frozen=True)
class Claim:
    """A unit under lease. `fence` and `worker` must be named by every later write. `explains`: it predicts nothing, but
    explains what another unit has found.

    The fence alone would do, but for a Postgres that crashed and forgot the claim: it may give the number once more.
    """

    unit_id: uuid.UUID
    job_id: uuid.UUID
    tenant_id: str
    kind: JobKind
    attempt: int
    fence: int
    worker: str
    explains: bool = False


@dataclass(frozen=True)
class ScanOutcome:
    """The end of one scan: a label with its probabilities and the engine that computed them, or an error.

    `disposition`, `reason`, `ood_score`: see ml/disposition.py. `statistics` of the picture are counted, and not kept.
    """

    ordinal: int
    label: str | None = None
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    engine: str | None = None
    cached: bool = False
    """Taken from an equal result: the same scan by the same model on the same engine."""
    error: Json | None = None
    disposition: str | None = None
    reason: str | None = None
    ood_score: float | None = None
    statistics: Mapping[str, float] | None = None


def seconds(value: Any) -> ColumnElement[dt.timedelta]:
    """A Postgres interval of so many seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, value)


# --- the lock and the fence ---


def locking(statement: Any) -> Any:
    """With the job's row locked. NO KEY UPDATE: rows that refer to the job can still be inserted meanwhile."""
    return statement.with_for_update(of=Job, key_share=True)


def lock_job(session: Session, job_id: uuid.UUID) -> None:
    """Wait for whoever changes this job, and keep others out until the transaction's end."""
    session.execute(locking(select(Job.id).where(Job.id == job_id)))


def holds(held: Claim) -> ColumnElement[bool]:
    """The fence: true only for the claim that is in force."""
    mine = and_(Unit.id == held.unit_id, Unit.fence == held.fence, Unit.worker == held.worker)
    return and_(mine, Unit.state == UnitState.RUNNING)


def require_held(session: Session, held: Claim, *guards: ColumnElement[bool], **values: Any) -> None:
    """Write to the unit under its fence.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    written = session.execute(
        update(Unit).where(holds(held), *guards).values(**values).execution_options(synchronize_session=False)
    )
    if written.rowcount == 0:  # type: ignore[attr-defined]
        raise LeaseLost


# --- events, bells, counters ---


def record(session: Session, job_id: uuid.UUID, tenant_id: str, type_: str, data: Json) -> None:
    """Append an event."""
    session.execute(insert(JobEvent).values(job_id=job_id, tenant_id=tenant_id, type=type_, data=data))


def wake_dispatcher(session: Session) -> None:
    """Ring the dispatcher at commit."""
    session.execute(select(func.pg_notify(UNITS_CHANNEL, "")))


def count(session: Session, job_id: uuid.UUID, **more: int) -> None:
    """Raise the job's counters."""
    values = {name: getattr(Job, name) + number for name, number in more.items() if number}
    if values:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


# --- a unit's scans ---


# All of a chunk in one statement: 2048 rows in one trip. The ordinals are named once more by themselves: a planner that
# has not seen a new batch yet takes it for a few rows, and would join the whole batch to find a chunk in it.
WRITE_OUTCOMES = Prepared(
    "write_outcomes",
    "uuid, int[], jsonb",
    """
UPDATE scan_results SET state = CASE WHEN ended.error IS NULL THEN 'succeeded' ELSE 'failed' END,
    label = ended.label, confidence = ended.confidence, probabilities = ended.probabilities, engine = ended.engine,
    cached = coalesce(ended.cached, false), error = ended.error, disposition = ended.disposition,
    reason = ended.reason, ood_score = ended.ood_score, finished_at = (SELECT clock_timestamp())
FROM jsonb_to_recordset($3) AS ended (ordinal int, label text, confidence float8, probabilities jsonb, engine text,
    cached boolean, error jsonb, disposition text, reason text, ood_score float8)
WHERE scan_results.job_id = $1 AND scan_results.ordinal = ANY ($2) AND scan_results.ordinal = ended.ordinal
""",
)


def write_outcomes(session: Session, held: Claim, outcomes: Sequence[ScanOutcome], counted: bool = False) -> None:
    """Write the ends of scans of the unit, and count them where the caller has not."""
    if not outcomes:
        return
    ordinals = [outcome.ordinal for outcome in outcomes]
    WRITE_OUTCOMES(session, str(held.job_id), ordinals, json.dumps([_kept(outcome) for outcome in outcomes]))
    _count_predictions(session, held, outcomes)
    if not counted:
        failed = sum(outcome.error is not None for outcome in outcomes)
        count(session, held.job_id, succeeded=len(outcomes) - failed, failed=failed)
        for engine in engines_of(outcomes):
            new = update(Job).where(Job.id == held.job_id, literal(engine) != all_(Job.engines))
            session.execute(new.values(engines=func.array_append(Job.engines, engine)))


def _kept(outcome: ScanOutcome) -> Json:
    return {name: value for name, value in vars(outcome).items() if value is not None and name != "statistics"}


def _count_predictions(session: Session, held: Claim, outcomes: Sequence[ScanOutcome]) -> None:
    """Count what was predicted now, for jobs/drift.py. Failures are no predictions, and what was taken over was counted
    when it was computed."""
    found: dict[str, list[str | float]] = {}
    for outcome in outcomes:
        if outcome.error is None and not outcome.cached:
            said = {CLASS: outcome.label, DISPOSITION: outcome.disposition, "confidence": outcome.confidence}
            for what, value in (*said.items(), *(outcome.statistics or {}).items()):
                if value is not None:
                    found.setdefault(what, []).append(value)
    if found:
        prediction_counts.add(session, held.job_id, found)


def engines_of(outcomes: Sequence[ScanOutcome]) -> list[str]:
    """Which engines computed them, each once."""
    return sorted({outcome.engine for outcome in outcomes if outcome.engine is not None})


def end_scans(session: Session, held: Claim, state: ResultState, error: Json | None) -> None:
    """End a unit's pending scans alike, and count them. A unit without scans counts as one."""
    ended = 1
    if held.kind in PREDICTIONS:
        ended = session.execute(
            update(ScanResult)
            .where(ScanResult.unit_id == held.unit_id, ScanResult.state == ResultState.PENDING)
            .values(state=state, error=error, finished_at=NOW)
            .execution_options(synchronize_session=False)
        ).rowcount  # type: ignore[attr-defined]
    count(session, held.job_id, **{str(state): ended})


def add_unit(session: Session, held: Claim, **values: Any) -> uuid.UUID:
    """One more unit of the job, after all that it has; its id."""
    of_job = select(func.max(Unit.ordinal) + 1, func.max(Unit.lane)).where(Unit.job_id == held.job_id)
    ordinal, lane = session.execute(of_job).one()
    unit_id = new_id()
    own = {"id": unit_id, "tenant_id": held.tenant_id, "job_id": held.job_id, "ordinal": ordinal, "lane": lane}
    session.execute(insert(Unit).values(**own, **values))
    return unit_id


# --- the end of a job ---


END_JOB = Prepared(
    "end_job",
    "uuid",
    """
WITH ended AS (
    UPDATE jobs SET finished_at = clock_timestamp(),
        progress = CASE WHEN succeeded = total THEN 1 ELSE progress END,
        state = CASE
            WHEN succeeded = total THEN 'succeeded'
            WHEN cancel_requested_at IS NOT NULL AND cancelled > 0 THEN 'cancelled'
            WHEN succeeded = 0 THEN 'failed'
            ELSE 'partially_succeeded' END
    WHERE id = $1 AND finished_at IS NULL
        AND NOT EXISTS (SELECT FROM units WHERE units.job_id = $1 AND units.finished_at IS NULL)
    RETURNING id, tenant_id, kind, state, total, succeeded, failed, cancelled, error
), told AS (
    INSERT INTO job_events (job_id, tenant_id, type, data)
    SELECT id, tenant_id, state, jsonb_build_object('counts', jsonb_build_object(
        'total', total, 'succeeded', succeeded, 'failed', failed, 'cancelled', cancelled)) FROM ended
), unloaded AS (
    UPDATE tenant_loads SET scans = scans - total, batches = batches - (kind = 'predict_batch')::int
    FROM ended WHERE tenant_loads.tenant_id = ended.tenant_id
)
SELECT tenant_id, kind, state, total, state = 'failed' AND error IS NULL AS unexplained,
    EXISTS (SELECT FROM webhooks WHERE webhooks.tenant_id = ended.tenant_id) AS has_webhooks FROM ended
""",
)


def end_if_done(session: Session, job_id: uuid.UUID) -> None:
    """When no unit is left, the counters say how the job ended; its event is written, its tenant's load falls, and its
    tenant's webhooks hear of it."""
    ended = END_JOB(session, str(job_id)).first()
    if ended is None:
        return
    if ended.has_webhooks:
        data = {"job_id": str(job_id), "kind": ended.kind, "state": ended.state}
        webhooks.emit(session, ended.tenant_id, f"job_{job_id}_{ended.state}", f"job.{ended.state}", data)
    if ended.unexplained:
        session.execute(update(Job).where(Job.id == job_id).values(error=_error_of_scans(session, job_id, ended.total)))


def _error_of_scans(session: Session, job_id: uuid.UUID, total: int) -> Json:
    if total == 1:
        return session.scalars(select(ScanResult.error).where(ScanResult.job_id == job_id)).one() or {}
    return {
        "code": "ALL_SCANS_FAILED",
        "detail": f"None of the {total} scans has a result. GET /jobs/ID/results?state=failed says why for each.",
        "retryable": False,
    }
