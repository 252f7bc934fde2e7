"""The verbs that move jobs and units on. Each takes a session and never commits: the caller owns the transaction.

Every change of state is one guarded UPDATE, and zero rows changed means "refused". A verb that touches both a job and
its units locks the job's row first. No transaction waits for a second job's lock (`claim_next`, which may follow an
end, passes over what is locked), so that no two verbs can wait for each other. Only Postgres' clock decides.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, literal, or_, select, text, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Prepared, seconds
from jobs.errors import JobNotFound, LeaseLost, WrongState
from jobs.queue import explanations
from jobs.queue.completion import end_if_done
from jobs.queue.job_events import record, wake_dispatcher
from jobs.queue.leases import Claim, holds, lock_job, locking, require_held
from jobs.queue.outcomes import ScanOutcome, end_scans, engines_of, write_outcomes
from jobs.queue.splitting import is_suspect, split
from jobs.settings import Settings
from jobs.states import CLAIMABLE, PREDICTIONS, TERMINAL, JobKind, JobState, ResultState, UnitState
from jobs.tables import Job, Json, Unit


@dataclass(frozen=True)
class RetryPolicy:
    """How often a unit may fail, and how long it waits in between: evenly between 0 and a bound that doubles from
    `base` to `cap` seconds (full jitter), so that retries never march in step."""

    max_failures: int = 3
    base: float = 0.0
    cap: float = 60.0

    @classmethod
    def of(cls, settings: Settings) -> "RetryPolicy":
        """The policy of the settings."""
        return cls(settings.max_failures, settings.retry_base_seconds, settings.retry_cap_seconds)

    def wait(self) -> ColumnElement[Any]:
        """A unit's wait before its next try, in SQL."""
        return seconds(func.random() * func.least(self.cap, self.base * func.power(2, Unit.failures)))


# --- a worker's life with a unit ---


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
    lock_job(session, held.job_id)
    require_held(session, held, progress_at=NOW)
    said = {"stage": stage, "stages": stages, "progress": progress, "mlflow_run_id": mlflow_run_id}
    values = {name: value for name, value in said.items() if value is not None}
    if values:
        session.execute(update(Job).where(Job.id == held.job_id).values(**values))
    if event is not None:
        record(session, held.job_id, held.tenant_id, event[0], {**event[1], "attempt": held.attempt})


SUCCEED = Prepared(
    "succeed_unit",
    "uuid, uuid, bigint, text, int, int, float8, jsonb, varchar[]",
    """
WITH job AS MATERIALIZED (SELECT id FROM jobs WHERE id = $1 FOR NO KEY UPDATE),
succeeded AS (
    UPDATE units SET state = 'succeeded', finished_at = clock_timestamp(), lease_expires_at = NULL
    FROM job
    WHERE units.id = $2 AND fence = $3 AND worker = $4 AND state = 'running' AND units.job_id = job.id
    RETURNING units.job_id
)
UPDATE jobs SET succeeded = jobs.succeeded + $5, failed = jobs.failed + $6,
    device_seconds = device_seconds + $7, metrics = coalesce($8, metrics),
    engines = CASE WHEN jobs.engines @> $9 THEN jobs.engines
        ELSE array(SELECT DISTINCT unnest(jobs.engines || $9) ORDER BY 1) END
FROM succeeded WHERE jobs.id = succeeded.job_id
RETURNING pg_notify('renalq_units', '')
""",
)


def succeed(
    session: Session,
    held: Claim,
    *,
    outcomes: Sequence[ScanOutcome] = (),
    metrics: Json | None = None,
    device_seconds: float = 0.0,
    then_explain: bool = False,
) -> None:
    """End the unit well: its results, the counters and, with the last unit, the job's end, in this one transaction.

    `then_explain`: a unit that explains its results comes after all that the job has.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    failed = sum(outcome.error is not None for outcome in outcomes)
    succeeded = 1 if held.kind not in PREDICTIONS else len(outcomes) - failed
    figures = None if metrics is None else json.dumps(metrics)
    mine = str(held.job_id), str(held.unit_id), held.fence, held.worker
    engines = engines_of(outcomes)
    if SUCCEED(session, *mine, succeeded, failed, device_seconds, figures, engines).first() is None:
        raise LeaseLost
    write_outcomes(session, held, outcomes, counted=True)
    if then_explain:
        explanations.follow(session, held)
    end_if_done(session, held.job_id)


def fail(
    session: Session,
    held: Claim,
    error: Json,
    retry: RetryPolicy = RetryPolicy(),
    outcomes: Sequence[ScanOutcome] = (),
) -> UnitState:
    """A failure of the unit: back to the queue after a wait when it may be tried again, else its end.

    `error` is `{"code", "detail", "retryable"}`; `outcomes` are the scans that were done before it. Returns the state
    that the unit has now.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, held.job_id)
    return _fail(session, held, error, retry, holds(held), outcomes)


def _fail(
    session: Session,
    held: Claim,
    error: Json,
    retry: RetryPolicy,
    guard: ColumnElement[bool],
    outcomes: Sequence[ScanOutcome] = (),
) -> UnitState:
    again = and_(literal(bool(error.get("retryable"))), Unit.failures + 1 < retry.max_failures)
    row = session.execute(
        update(Unit)
        .where(guard)
        .values(
            state=case((again, UnitState.QUEUED.value), else_=UnitState.FAILED.value),
            failures=Unit.failures + 1,
            finished_at=case((again, None), else_=NOW),
            not_before=NOW + retry.wait(),
            scans=func.greatest(1, Unit.scans - len(outcomes)),
            **_let_go(),
            error=error,
        )
        .returning(Unit.state, Unit.failures)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        raise LeaseLost
    write_outcomes(session, held, outcomes)
    if row.state == UnitState.QUEUED:
        if is_suspect(held.kind, error, row.failures, retry.max_failures):
            split(session, held, failures=max(0, retry.max_failures - 2))
        _handed_back(session, held, error)
    else:
        end_scans(session, held, ResultState.FAILED, error)
        session.execute(update(Job).where(Job.id == held.job_id).values(error=error))
        end_if_done(session, held.job_id)
    return UnitState(row.state)


def requeue(session: Session, held: Claim, reason: str, outcomes: Sequence[ScanOutcome] = ()) -> None:
    """Hand the unit back, with no failure counted (a drain, or a yield). `outcomes`: the scans that are done.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, held.job_id)
    left = func.greatest(1, Unit.scans - len(outcomes))
    require_held(session, held, state=UnitState.QUEUED, not_before=NOW, scans=left, **_let_go())
    write_outcomes(session, held, outcomes)
    _handed_back(session, held, {"code": reason})


def _let_go() -> Json:
    return {"lease_expires_at": None, "dispatched_at": None, "yield_requested_at": None, "rings": 0}


def _handed_back(session: Session, held: Claim, why: Json) -> None:
    """The unit waits again; or it ends, where the job's end was asked for meanwhile: nobody could claim it any more."""
    record(session, held.job_id, held.tenant_id, "requeued", {"attempt": held.attempt, "reason": why.get("code")})
    unwanted = session.scalar(select(Job).where(Job.id == held.job_id, Job.cancel_requested_at.is_not(None)))
    if unwanted is None:
        wake_dispatcher(session)
    else:
        _cancel_unheld(session, unwanted)
        end_if_done(session, held.job_id)


def cancelled(session: Session, held: Claim, outcomes: Sequence[ScanOutcome] = ()) -> None:
    """The worker has stopped because somebody asked for it. `outcomes`: the scans that were done by then.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, held.job_id)
    require_held(session, held, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    write_outcomes(session, held, outcomes)
    end_scans(session, held, ResultState.CANCELLED, None)
    end_if_done(session, held.job_id)


# --- others who may end a unit ---


def cancel(session: Session, tenant_id: str, job_id: uuid.UUID) -> Job:
    """Ask for the job's end. Units that nobody holds end here; a worker ends those it holds. Repeated: the same.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: the job has ended otherwise.
    """
    job = session.scalar(locking(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)))
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
        held = Claim(unit_id, job.id, job.tenant_id, JobKind(job.kind), attempt=0, fence=0, worker="")
        end_scans(session, held, ResultState.CANCELLED, None)


def reap(session: Session, *, retry: RetryPolicy, stall: float) -> int:
    """Take one unit back from a worker that stopped beating, or whose work has not moved for `stall` seconds.

    A candidate is only a candidate: state, fence AND expiry are checked again in the UPDATE that takes it, since its
    worker may beat or end it in between. Returns how many were taken, 0 or 1: one job a transaction.

    Raises:
        OperationalError: somebody keeps the lock of the job or the unit; it waits for a short time only.
    """
    session.execute(text("SET LOCAL lock_timeout TO '500ms'"))
    lost = or_(Unit.lease_expires_at < NOW, Unit.progress_at < NOW - seconds(stall))
    row = session.execute(
        select(Unit.id, Unit.job_id, Unit.tenant_id, Unit.attempt, Unit.fence, Unit.worker)
        .add_columns(Job.kind, Job.cancel_requested_at, (Unit.lease_expires_at < NOW).label("silent"))
        .join(Job, Job.id == Unit.job_id)
        .where(Unit.state == UnitState.RUNNING, lost)
        .order_by(func.random())  # one that is always refused must not hide the others
        .limit(1)
    ).first()
    return 0 if row is None else int(_reap_one(session, row, lost, retry))


def _reap_one(session: Session, row: Any, lost: ColumnElement[bool], retry: RetryPolicy) -> bool:
    held = Claim(row.id, row.job_id, row.tenant_id, JobKind(row.kind), row.attempt, row.fence, row.worker)
    lock_job(session, held.job_id)
    try:
        if row.cancel_requested_at is not None:
            _end_reaped_as_cancelled(session, held, lost)
        else:
            _fail(session, held, WORKER_LOST if row.silent else STALLED, retry, and_(holds(held), lost))
    except LeaseLost:
        return False
    return True


def _end_reaped_as_cancelled(session: Session, held: Claim, lost: ColumnElement[bool]) -> None:
    """Whoever asked to cancel need not wait for another worker only to have it stop."""
    require_held(session, held, lost, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    end_scans(session, held, ResultState.CANCELLED, None)
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
