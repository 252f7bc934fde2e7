"""Transitions of jobs and units. Functions take a session and never commit: the caller owns the transaction.

Every change of state is one guarded UPDATE; zero rows changed means "refused". Only Postgres' clock decides.

There are no deadlocks, since every transaction takes its locks in this order:

    registry or blob (advisory) → idempotency key → dataset → job → unit → results → checkpoints
        → model versions → counts → tenant's load → counts of ended jobs → webhook → deliveries

A transaction waits for the lock of one job at most, and of its units only under that lock or for a single one (a
heartbeat, a claim). Whatever takes several jobs, or several units without their job, skips locked rows (`claim_next`,
dispatch, `enqueue_due`, prunes). The one exception is the deletion of a dataset, which waits for its jobs one after
another: no transaction waits for a dataset while it holds one of them.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, literal, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from jobs.db import NOW, PreparedStatement, seconds
from jobs.errors import JobNotFound, LeaseLost, WrongState
from jobs.events.job_events import CANCELLATION, place, record, wake_dispatcher
from jobs.queue import explanations
from jobs.queue.completion import INLINE_ROWS, cancel_units, finish_job_if_done
from jobs.queue.leases import Claim, is_held, lock_job, update_held, with_job_lock
from jobs.queue.outcomes import ScanOutcome, count_failure, engines_of, finish_items, write_outcomes
from jobs.queue.splitting import should_split, split
from jobs.settings import Settings
from jobs.states import PREDICTIONS, TERMINAL, JobState, ResultState, UnitState
from jobs.tables import Job, Json, Unit


@dataclass(frozen=True)
class RetryPolicy:
    """How often a unit may fail, and how long it waits in between: a random time up to a bound that doubles from
    `base` to `cap` seconds (full jitter), so that retries do not synchronize."""

    max_failures: int = 3
    base: float = 0.0
    cap: float = 60.0

    @classmethod
    def of(cls, settings: Settings) -> "RetryPolicy":
        """The policy in the settings."""
        return cls(settings.max_failures, settings.retry_base_seconds, settings.retry_cap_seconds)

    @property
    def waiting_state(self) -> UnitState:
        """The state of a unit that is to be attempted again."""
        return UnitState.SCHEDULED if self.base else UnitState.QUEUED

    def wait(self) -> ColumnElement[Any]:
        """SQL: how long a unit waits before its next attempt."""
        return seconds(func.random() * func.least(self.cap, self.base * func.power(2, Unit.failures)))


# --- by the worker that holds the unit ---


def report(
    session: Session,
    claim: Claim,
    *,
    stage: str | None = None,
    stages: list[Json] | None = None,
    progress: float | None = None,
    mlflow_run_id: str | None = None,
    event: tuple[str, Json] | None = None,
    done: int | None = None,
    warmup_seconds: float | None = None,
    seconds_left: float | None = None,
) -> None:
    """Record progress, the state of stages, the MLflow run or an event of the unit. With none of them: that the work
    goes on, which locks the unit's row only.

    Of the unit itself: how many of its scans are `done`, what it took until its network was loaded, and how long it
    will still take, as far as its worker knows. Progress never falls.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    given = {"stage": stage, "stages": stages, "progress": progress, "mlflow_run_id": mlflow_run_id}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if values or event is not None:
        lock_job(session, claim.job_id)
    expected = NOW + seconds(seconds_left) if seconds_left is not None else None
    own = {"done": done, "warmup_seconds": warmup_seconds, "expected_at": expected}
    update_held(session, claim, progress_at=NOW, **{name: value for name, value in own.items() if value is not None})
    if progress is not None:
        values["progress"] = func.greatest(Job.progress, progress)
    if values:
        session.execute(update(Job).where(Job.id == claim.job_id).values(**values))
    if event is not None:
        record(session, claim.job_id, claim.tenant_id, event[0], {**event[1], "attempt": claim.attempt})


SUCCEED = PreparedStatement(
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
RETURNING pg_notify('renalq_units', 'ended')
""",
)


def succeed(
    session: Session,
    claim: Claim,
    *,
    outcomes: Sequence[ScanOutcome] = (),
    metrics: Json | None = None,
    device_seconds: float = 0.0,
    enqueue_explanations: bool = False,
    warmup_seconds: float | None = None,
) -> None:
    """Finish the unit: results, counters and, with the last unit, the job's end, in this one transaction.

    `enqueue_explanations`: append a unit to the job that explains these results. `warmup_seconds`: what it took until
    its network was loaded, which tells nothing of the next unit.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    failed = sum(outcome.error is not None for outcome in outcomes)
    succeeded = 1 if claim.kind not in PREDICTIONS else len(outcomes) - failed
    metrics_json = None if metrics is None else json.dumps(metrics)
    fence = str(claim.job_id), str(claim.unit_id), claim.fence, claim.worker
    engines = engines_of(outcomes)
    if warmup_seconds is not None:  # once per network and worker
        lock_job(session, claim.job_id)
        update_held(session, claim, warmup_seconds=warmup_seconds)
    if SUCCEED(session, *fence, succeeded, failed, device_seconds, metrics_json, engines).first() is None:
        raise LeaseLost
    write_outcomes(session, claim, outcomes, counted=True)
    if enqueue_explanations and (ordinal := explanations.enqueue(session, claim)) is not None:
        wake_dispatcher(session, place(claim.job_id, ordinal))
    finish_job_if_done(session, claim.job_id)


def fail(
    session: Session,
    claim: Claim,
    error: Json,
    retry: RetryPolicy = RetryPolicy(),
    outcomes: Sequence[ScanOutcome] = (),
) -> UnitState:
    """Record a failure: the unit goes back to the queue if it may be retried, otherwise it fails for good.

    `error` is `{"code", "detail", "retryable"}`; `outcomes` are the scans that were finished before. Returns the unit's
    new state.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, claim.job_id)
    return fail_guarded(session, claim, error, retry, is_held(claim), outcomes)


def fail_guarded(
    session: Session,
    claim: Claim,
    error: Json,
    retry: RetryPolicy,
    guard: ColumnElement[bool],
    outcomes: Sequence[ScanOutcome] = (),
) -> UnitState:
    """As `fail`, of a unit for which `guard` holds. The job's row must be locked."""
    again = and_(literal(bool(error.get("retryable"))), Unit.failures + 1 < retry.max_failures)
    row = session.execute(
        update(Unit)
        .where(guard)
        .values(
            state=case((again, retry.waiting_state.value), else_=UnitState.FAILED.value),
            failures=Unit.failures + 1,
            finished_at=case((again, None), else_=NOW),
            not_before=NOW + retry.wait(),
            scans=func.greatest(1, Unit.scans - len(outcomes)),
            **_released_fields(),
            error=error,
        )
        .returning(Unit.state, Unit.failures, Unit.explains)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        raise LeaseLost
    write_outcomes(session, claim, outcomes)
    count_failure(session, claim, error, row.state != UnitState.FAILED)
    if row.state != UnitState.FAILED:
        if should_split(claim.kind, error, row.failures, retry.max_failures):
            split(session, claim, failures=max(0, retry.max_failures - 2))
        _after_requeue(session, claim, error)
    else:
        finish_items(session, claim, ResultState.FAILED, error)
        if row.explains is not None:
            _warn(session, claim, error)
        finish_job_if_done(session, claim.job_id)
    return UnitState(row.state)


def _warn(session: Session, claim: Claim, error: Json) -> None:
    """Show the error on the job without failing it: its scans have their results. Each code once, however many units
    fail with it."""
    is_new = ~Job.warnings.contains([{"code": error["code"]}])
    warned = Job.warnings.concat(literal([error], JSONB))
    session.execute(update(Job).where(Job.id == claim.job_id, is_new).values(warnings=warned))


def requeue(session: Session, claim: Claim, reason: str, outcomes: Sequence[ScanOutcome] = ()) -> None:
    """Hand the unit back without counting a failure (drain or yield). `outcomes`: the scans that are finished.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, claim.job_id)
    left = func.greatest(1, Unit.scans - len(outcomes))
    update_held(session, claim, state=UnitState.QUEUED, not_before=NOW, scans=left, **_released_fields())
    write_outcomes(session, claim, outcomes)
    _after_requeue(session, claim, {"code": reason})


def _released_fields() -> Json:
    return {"lease_expires_at": None, "dispatched_at": None, "yield_requested_at": None, "rings": 0}


def _after_requeue(session: Session, claim: Claim, error: Json) -> None:
    """Wake the dispatcher; or cancel the unit if its job was cancelled meanwhile, since nobody could claim it."""
    record(session, claim.job_id, claim.tenant_id, "requeued", {"attempt": claim.attempt, "reason": error.get("code")})
    cancelled = select(Job.cancel_requested_at.is_not(None)).where(Job.id == claim.job_id)
    if session.scalar(cancelled):
        cancel_units(session, claim.job_id)
    wake_dispatcher(session, place(claim.job_id, claim.ordinal))


def confirm_cancel(session: Session, claim: Claim, outcomes: Sequence[ScanOutcome] = ()) -> None:
    """End the unit as cancelled: its worker has stopped on request. `outcomes`: the scans that are finished.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, claim.job_id)
    update_held(session, claim, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    write_outcomes(session, claim, outcomes)
    finish_items(session, claim, ResultState.CANCELLED, None)
    finish_job_if_done(session, claim.job_id)


# --- by the API and the dispatcher ---


def cancel(session: Session, tenant_id: str, job_id: uuid.UUID) -> Job:
    """Request the job's cancellation. Idempotent. Claimed units are ended by their workers; unclaimed ones here if they
    have at most `INLINE_ROWS` results to end, otherwise soon after by the leading dispatcher.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: the job has ended in another state.
    """
    job = session.scalar(with_job_lock(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)))
    if job is None:
        raise JobNotFound
    if job.state in TERMINAL and job.state != JobState.CANCELLED:
        raise WrongState(state=job.state, verb="cancelling", allowed="queued or running")
    if job.cancel_requested_at is None:
        job.cancel_requested_at = session.scalar(select(NOW))
        session.flush()
        record(session, job.id, tenant_id, "cancel_requested", {})
        if job.total - job.succeeded - job.failed <= INLINE_ROWS:
            cancel_units(session, job.id)
        wake_dispatcher(session, CANCELLATION)
        session.refresh(job)
    return job


ENQUEUE_DUE = PreparedStatement(
    "enqueue_due",
    "int",
    """
WITH due AS (
    SELECT id FROM units WHERE state = 'scheduled' AND not_before <= now()
    ORDER BY not_before LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE units SET state = 'queued' WHERE id = ANY (ARRAY(SELECT id FROM due)) RETURNING job_id, ordinal
""",
)


def enqueue_due(session: Session, limit: int = 1000) -> list[str]:
    """Queue up to `limit` units whose time has come, for the dispatcher that plans next. Returns their places."""
    return [place(row.job_id, row.ordinal) for row in ENQUEUE_DUE(session, limit)]
