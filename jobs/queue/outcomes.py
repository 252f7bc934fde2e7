"""The ends of a unit's scans, and the job's counters."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import all_, func, literal, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Prepared
from jobs.queue import prediction_counts
from jobs.queue.leases import Claim
from jobs.queue.prediction_counts import CLASS, DISPOSITION
from jobs.states import PREDICTIONS, ResultState
from jobs.tables import Job, Json, ScanResult


@dataclass(frozen=True)
class ScanOutcome:
    """The end of one scan: a label with its probabilities and the engine that computed them, or an error.

    `disposition`, `reason`, `ood_score`: see ml/image/serving/disposition.py. `statistics` of the picture are
    counted, and not kept.
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


def count(session: Session, job_id: uuid.UUID, **more: int) -> None:
    """Raise the job's counters."""
    values = {name: getattr(Job, name) + number for name, number in more.items() if number}
    if values:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


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
    """Count what was predicted now, for jobs/models/drift.py. Failures are no predictions, and what was taken over
    was counted when it was computed."""
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
