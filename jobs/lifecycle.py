"""The verbs that move jobs and units on. Each takes a session and never commits: the caller owns the transaction.

Every change of state is one guarded UPDATE, and zero rows changed means "refused". A verb that touches both a job and
its units locks the job's row first, so that no two verbs can wait for each other. Only Postgres' clock decides.
"""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Update, and_, case, exists, func, insert, literal, or_, select, update
from sqlalchemy.orm import Session

from jobs.errors import JobNotFound, LeaseLost, WrongState
from jobs.states import CLAIMABLE, TERMINAL, UNIT_TERMINAL, JobKind, JobState, ResultState, UnitState
from jobs.tables import FENCE, Job, JobEvent, Json, ScanResult, Unit

UNITS_CHANNEL = "renalq_units"
"""NOTIFY channel: some unit waits for the dispatcher."""
JOBS_CHANNEL = "renalq_jobs"
"""NOTIFY channel: the job whose id is the payload has changed. A trigger sends it."""

NOW = func.clock_timestamp()


@dataclass(frozen=True)
class Claim:
    """A unit under lease. `fence` must be named by every later write."""

    unit_id: uuid.UUID
    job_id: uuid.UUID
    tenant_id: str
    kind: JobKind
    attempt: int
    fence: int


@dataclass(frozen=True)
class Standing:
    """What a beat learns: whether the lease is still held, and whether somebody asked to cancel."""

    held: bool
    cancel_requested: bool


@dataclass(frozen=True)
class ScanOutcome:
    """The end of one scan: a label with its probabilities, or an error."""

    ordinal: int
    label: str | None = None
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    error: Json | None = None


def seconds(value: float) -> ColumnElement[dt.timedelta]:
    """A Postgres interval of so many seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, value)


# --- a worker's life with a unit ---


def claim(session: Session, unit_id: uuid.UUID, worker: str, lease: float) -> Claim | None:
    """Take the unit under lease. None means refused: it is taken, ended, cancelled, or not due yet."""
    job = session.execute(
        _locking(select(Job.id, Job.kind, Job.tenant_id).join(Unit, Unit.job_id == Job.id).where(Unit.id == unit_id))
    ).first()
    if job is None:
        return None
    row = session.execute(
        update(Unit)
        .where(
            Unit.id == unit_id,
            Unit.state.in_(CLAIMABLE),
            Unit.not_before <= NOW,
            exists().where(Job.id == Unit.job_id, Job.state.not_in(TERMINAL), Job.cancel_requested_at.is_(None)),
        )
        .values(
            state=UnitState.RUNNING,
            attempt=Unit.attempt + 1,
            fence=FENCE.next_value(),
            worker=worker,
            lease_expires_at=NOW + seconds(lease),
            started_at=NOW,
            progress_at=NOW,
            error=None,
        )
        .returning(Unit.attempt, Unit.fence)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        return None
    _start_job(session, job.id, job.tenant_id, row.attempt, worker)
    return Claim(unit_id, job.id, job.tenant_id, JobKind(job.kind), row.attempt, row.fence)


def _start_job(session: Session, job_id: uuid.UUID, tenant_id: str, attempt: int, worker: str) -> None:
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .values(
            state=JobState.RUNNING,
            started_at=func.coalesce(Job.started_at, NOW),
            attempt=func.greatest(Job.attempt, attempt),
        )
        .execution_options(synchronize_session=False)
    )
    record(session, job_id, tenant_id, "claimed", {"attempt": attempt, "worker": worker})


def beat(session: Session, held: Claim, lease: float) -> Standing:
    """Renew the lease. It touches the unit's row alone, so that a busy job never delays it."""
    wanted = select(Job.cancel_requested_at.is_not(None)).where(Job.id == held.job_id).scalar_subquery()
    cancel = session.execute(
        _fenced(update(Unit), held).values(lease_expires_at=NOW + seconds(lease)).returning(wanted)
    ).scalar()
    return Standing(held=cancel is not None, cancel_requested=bool(cancel))


def report(
    session: Session,
    held: Claim,
    *,
    stage: str | None = None,
    stages: list[Json] | None = None,
    progress: float | None = None,
    mlflow_run_id: str | None = None,
    event: tuple[str, Json] | None = None,
) -> None:
    """Write down how far the unit has come.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    _lock_job(session, held.job_id)
    _require_held(session, held, progress_at=NOW)
    said = {"stage": stage, "stages": stages, "progress": progress, "mlflow_run_id": mlflow_run_id}
    values = {name: value for name, value in said.items() if value is not None}
    if values:
        session.execute(update(Job).where(Job.id == held.job_id).values(**values))
    if event is not None:
        record(session, held.job_id, held.tenant_id, event[0], {**event[1], "attempt": held.attempt})


def succeed(
    session: Session,
    held: Claim,
    *,
    outcomes: Sequence[ScanOutcome] = (),
    metrics: Json | None = None,
    device_seconds: float = 0.0,
) -> None:
    """End the unit well: its results, the counters and, with the last unit, the job's end, in this one transaction.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    _lock_job(session, held.job_id)
    _require_held(session, held, state=UnitState.SUCCEEDED, finished_at=NOW, lease_expires_at=None)
    if outcomes:
        _write_outcomes(session, held, outcomes)
        failed = sum(outcome.error is not None for outcome in outcomes)
        count(session, held.job_id, succeeded=len(outcomes) - failed, failed=failed)
    else:
        count(session, held.job_id, succeeded=1)
    values: Json = {"device_seconds": Job.device_seconds + device_seconds}
    if metrics is not None:
        values["metrics"] = metrics
    session.execute(update(Job).where(Job.id == held.job_id).values(**values))
    end_if_done(session, held.job_id)


def _write_outcomes(session: Session, held: Claim, outcomes: Sequence[ScanOutcome]) -> None:
    now = session.scalar(select(NOW))
    session.execute(
        update(ScanResult),
        [
            {
                "job_id": held.job_id,
                "ordinal": outcome.ordinal,
                "state": ResultState.FAILED if outcome.error else ResultState.SUCCEEDED,
                "label": outcome.label,
                "confidence": outcome.confidence,
                "probabilities": dict(outcome.probabilities) if outcome.probabilities else None,
                "error": outcome.error,
                "finished_at": now,
            }
            for outcome in outcomes
        ],
    )


def fail(session: Session, held: Claim, error: Json, *, max_failures: int = 3, backoff: float = 0.0) -> UnitState:
    """A failure of the unit: back to the queue after `backoff` seconds when it may be tried again, else its end.

    `error` is `{"code", "detail", "retryable"}`. Returns the state that the unit has now.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    _lock_job(session, held.job_id)
    return _fail(session, held, error, max_failures, backoff, guard=_holds(held))


def _fail(
    session: Session, held: Claim, error: Json, max_failures: int, backoff: float, guard: ColumnElement[bool]
) -> UnitState:
    again = and_(literal(bool(error.get("retryable"))), Unit.failures + 1 < max_failures)
    state = session.execute(
        update(Unit)
        .where(guard)
        .values(
            state=case((again, UnitState.QUEUED.value), else_=UnitState.FAILED.value),
            failures=Unit.failures + 1,
            finished_at=case((again, None), else_=NOW),
            not_before=NOW + seconds(backoff),
            **_let_go(),
            error=error,
        )
        .returning(Unit.state)
        .execution_options(synchronize_session=False)
    ).scalar()
    if state is None:
        raise LeaseLost
    if state == UnitState.QUEUED:
        _handed_back(session, held, error)
    else:
        _end_scans(session, held, ResultState.FAILED, error)
        session.execute(update(Job).where(Job.id == held.job_id).values(error=error))
        end_if_done(session, held.job_id)
    return UnitState(state)


def requeue(session: Session, held: Claim, reason: str) -> None:
    """Hand the unit back as it is, with no failure counted (a drain).

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    _lock_job(session, held.job_id)
    _require_held(session, held, state=UnitState.QUEUED, not_before=NOW, **_let_go())
    _handed_back(session, held, {"code": reason})


def _let_go() -> Json:
    return {"lease_expires_at": None, "dispatched_at": None, "rings": 0}


def _handed_back(session: Session, held: Claim, why: Json) -> None:
    record(session, held.job_id, held.tenant_id, "requeued", {"attempt": held.attempt, "reason": why.get("code")})
    session.execute(select(func.pg_notify(UNITS_CHANNEL, "")))


def cancelled(session: Session, held: Claim) -> None:
    """The worker has stopped because somebody asked for it.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    _lock_job(session, held.job_id)
    _require_held(session, held, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    _end_scans(session, held, ResultState.CANCELLED, None)
    end_if_done(session, held.job_id)


# --- others who may end a unit ---


def cancel(session: Session, tenant_id: str, job_id: uuid.UUID) -> Job:
    """Ask for the job's end. Units that nobody holds end here; a worker ends those it holds. Repeated: the same.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: the job has ended otherwise.
    """
    job = session.scalar(_locking(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)))
    if job is None:
        raise JobNotFound
    if job.state in TERMINAL and job.state != JobState.CANCELLED:
        raise WrongState(state=job.state, verb="cancelling", allowed="queued or running")
    if job.cancel_requested_at is None:
        job.cancel_requested_at = session.scalar(select(NOW))
        session.flush()
        record(session, job.id, tenant_id, "cancel_requested", {})
        _cancel_unheld(session, job)
        end_if_done(session, job.id)
        session.refresh(job)
    return job


def _cancel_unheld(session: Session, job: Job) -> None:
    stopped = session.scalars(
        update(Unit)
        .where(Unit.job_id == job.id, Unit.state.in_(CLAIMABLE))
        .values(state=UnitState.CANCELLED, finished_at=NOW)
        .returning(Unit.id)
        .execution_options(synchronize_session=False)
    ).all()
    for unit_id in stopped:
        held = Claim(unit_id, job.id, job.tenant_id, JobKind(job.kind), attempt=0, fence=0)
        _end_scans(session, held, ResultState.CANCELLED, None)


def reap(session: Session, *, max_failures: int, stall: float, limit: int = 100) -> int:
    """Take units back from workers that stopped beating, or whose work has not moved for `stall` seconds.

    A candidate is only a candidate: state, fence AND expiry are checked again in the UPDATE that takes it, since its
    worker may beat or end it in between. Returns how many were taken.
    """
    lost = or_(Unit.lease_expires_at < NOW, Unit.progress_at < NOW - seconds(stall))
    candidates = session.execute(
        select(Unit.id, Unit.job_id, Unit.tenant_id, Unit.attempt, Unit.fence, Job.kind, Job.cancel_requested_at)
        .add_columns((Unit.lease_expires_at < NOW).label("silent"))
        .join(Job, Job.id == Unit.job_id)
        .where(Unit.state == UnitState.RUNNING, lost)
        .limit(limit)
    ).all()
    return sum(_reap_one(session, row, lost, max_failures) for row in candidates)


def _reap_one(session: Session, row: Any, lost: ColumnElement[bool], max_failures: int) -> bool:
    held = Claim(row.id, row.job_id, row.tenant_id, JobKind(row.kind), row.attempt, row.fence)
    _lock_job(session, held.job_id)
    try:
        if row.cancel_requested_at is not None:
            _end_reaped_as_cancelled(session, held, lost)
        else:
            _fail(
                session,
                held,
                WORKER_LOST if row.silent else STALLED,
                max_failures,
                0,
                and_(_holds(held), lost),
            )
    except LeaseLost:
        return False
    return True


def _end_reaped_as_cancelled(session: Session, held: Claim, lost: ColumnElement[bool]) -> None:
    """Whoever asked to cancel need not wait for another worker only to have it stop."""
    _require_held(session, held, lost, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    _end_scans(session, held, ResultState.CANCELLED, None)
    end_if_done(session, held.job_id)


WORKER_LOST: Json = {
    "code": "WORKER_LOST",
    "detail": "The worker stopped without a word. See its log; if this repeats, it may lack memory.",
    "retryable": True,
}
STALLED: Json = {
    "code": "STALLED",
    "detail": "The work made no progress in the stall limit. See the worker's log, or raise RENALQ_STALL_SECONDS.",
    "retryable": True,
}


# --- pieces ---


def record(session: Session, job_id: uuid.UUID, tenant_id: str, type_: str, data: Json) -> None:
    """Append an event."""
    session.execute(insert(JobEvent).values(job_id=job_id, tenant_id=tenant_id, type=type_, data=data))


def _locking(statement: Any) -> Any:
    """With the job's row locked. NO KEY UPDATE: rows that refer to the job can still be inserted meanwhile."""
    return statement.with_for_update(of=Job, key_share=True)


def _lock_job(session: Session, job_id: uuid.UUID) -> None:
    session.execute(_locking(select(Job.id).where(Job.id == job_id)))


def _holds(held: Claim) -> ColumnElement[bool]:
    return and_(Unit.id == held.unit_id, Unit.fence == held.fence, Unit.state == UnitState.RUNNING)


def _fenced(statement: Update, held: Claim, *guards: ColumnElement[bool]) -> Update:
    return statement.where(_holds(held), *guards).execution_options(synchronize_session=False)


def _require_held(session: Session, held: Claim, *guards: ColumnElement[bool], **values: Any) -> None:
    if session.execute(_fenced(update(Unit), held, *guards).values(**values)).rowcount == 0:  # type: ignore[attr-defined]
        raise LeaseLost


def _end_scans(session: Session, held: Claim, state: ResultState, error: Json | None) -> None:
    """End a unit's pending scans alike, and count them. A unit without scans counts as one."""
    if held.kind not in (JobKind.PREDICT, JobKind.PREDICT_BATCH):
        ended = 1
    else:
        ended = session.execute(
            update(ScanResult)
            .where(ScanResult.unit_id == held.unit_id, ScanResult.state == ResultState.PENDING)
            .values(state=state, error=error, finished_at=NOW)
            .execution_options(synchronize_session=False)
        ).rowcount  # type: ignore[attr-defined]
    count(session, held.job_id, **{str(state): ended})


def count(session: Session, job_id: uuid.UUID, **more: int) -> None:
    values = {name: getattr(Job, name) + number for name, number in more.items() if number}
    if values:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def end_if_done(session: Session, job_id: uuid.UUID) -> None:
    """When no unit is left, the counters say how the job ended. The caller holds the job's lock."""
    unfinished = exists().where(Unit.job_id == job_id, Unit.state.not_in(UNIT_TERMINAL))
    verdict = case(
        (Job.succeeded == Job.total, JobState.SUCCEEDED.value),
        (and_(Job.cancel_requested_at.is_not(None), Job.cancelled > 0), JobState.CANCELLED.value),
        (Job.succeeded == 0, JobState.FAILED.value),
        else_=JobState.PARTIALLY_SUCCEEDED.value,
    )
    ended = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.not_in(TERMINAL), ~unfinished)
        .values(state=verdict, finished_at=NOW, progress=case((verdict == "succeeded", 1.0), else_=Job.progress))
        .returning(Job.tenant_id, Job.state, Job.total, Job.succeeded, Job.failed, Job.cancelled, Job.error)
        .execution_options(synchronize_session=False)
    ).first()
    if ended is None:
        return
    counts = {
        "total": ended.total,
        "succeeded": ended.succeeded,
        "failed": ended.failed,
        "cancelled": ended.cancelled,
    }
    if ended.state == JobState.FAILED and ended.error is None:
        session.execute(update(Job).where(Job.id == job_id).values(error=_error_of_scans(session, job_id, ended.total)))
    record(session, job_id, ended.tenant_id, ended.state, {"counts": counts})


def _error_of_scans(session: Session, job_id: uuid.UUID, total: int) -> Json:
    if total == 1:
        return session.scalars(select(ScanResult.error).where(ScanResult.job_id == job_id)).one() or {}
    return {
        "code": "ALL_SCANS_FAILED",
        "detail": f"None of the {total} scans could be read. GET /jobs/ID/results?state=failed says why for each.",
        "retryable": False,
    }
