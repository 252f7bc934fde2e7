"""Leases of units: claim, renew, write under the fence. Also the lock of a job's row."""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, select, update
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement
from jobs.errors import LeaseLost
from jobs.events import webhooks
from jobs.states import JobKind, JobState, Lane, UnitState
from jobs.tables import IS_CANCELLING, IS_QUEUED, Job, Unit, new_id


@dataclass(frozen=True)
class Claim:
    """A unit under lease. `explains`: it computes explanations of another unit's results, not predictions. `ordinal`:
    its place among the units of its job, or any lower number.

    Every later write is guarded by `fence` and `worker`. The fence alone would suffice, except after a crash of
    Postgres that lost the claim: the sequence may then give the same number again.
    """

    unit_id: uuid.UUID
    job_id: uuid.UUID
    tenant_id: str
    kind: JobKind
    attempt: int
    fence: int
    worker: str
    explains: bool = False
    ordinal: int = 0


def with_job_lock(statement: Any, skip_locked: bool = False) -> Any:
    """Lock the job's row. NO KEY UPDATE: rows that refer to the job can still be inserted meanwhile."""
    return statement.with_for_update(of=Job, key_share=True, skip_locked=skip_locked)


def lock_job(session: Session, job_id: uuid.UUID) -> None:
    """Lock the job's row until the transaction ends."""
    session.execute(with_job_lock(select(Job.id).where(Job.id == job_id)))


def is_held(claim: Claim) -> ColumnElement[bool]:
    """SQL: the unit is running under this claim."""
    mine = and_(Unit.id == claim.unit_id, Unit.fence == claim.fence, Unit.worker == claim.worker)
    return and_(mine, Unit.state == UnitState.RUNNING)


def lock_held(session: Session, claim: Claim) -> None:
    """Lock the job and the unit until the transaction ends.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended.
    """
    lock_job(session, claim.job_id)
    if session.scalar(select(Unit.id).where(is_held(claim)).with_for_update(key_share=True)) is None:
        raise LeaseLost


def update_held(session: Session, claim: Claim, *guards: ColumnElement[bool], **values: Any) -> None:
    """Update the unit if it is still held.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    written = session.execute(
        update(Unit).where(is_held(claim), *guards).values(**values).execution_options(synchronize_session=False)
    )
    if written.rowcount == 0:  # type: ignore[attr-defined]
        raise LeaseLost


def add_unit(session: Session, claim: Claim, **values: Any) -> tuple[uuid.UUID, int]:
    """Append a unit to the job. Returns its id and ordinal."""
    of_job = select(func.max(Unit.ordinal) + 1, func.max(Unit.lane)).where(Unit.job_id == claim.job_id)
    ordinal, lane = session.execute(of_job).one()
    unit_id = new_id()
    own = {"id": unit_id, "tenant_id": claim.tenant_id, "job_id": claim.job_id, "ordinal": ordinal, "lane": lane}
    session.execute(insert(Unit).values(**own, kind=claim.kind, **values))
    return unit_id, ordinal


@dataclass(frozen=True)
class UnitStatus:
    """What a worker polls: whether it still holds the unit, and whether it was asked to stop."""

    held: bool
    cancel_requested: bool = False
    yield_requested: bool = False


def job_is(condition: str, of: str) -> str:
    """SQL: the job of a unit, a row of `of`, is one of these (`IS_QUEUED`, `IS_CANCELLING`), by the index of such jobs
    alone. Whole rows are compared and put in order: no other index, and no scan of the table, could give that."""
    rows = f"(jobs.lane, jobs.id) >= ({of}.lane, {of}.job_id) AND (jobs.lane, jobs.id) <= ({of}.lane, {of}.job_id)"
    return f"(SELECT true FROM jobs WHERE {condition} AND {rows} ORDER BY lane, id LIMIT 1) IS TRUE"  # noqa: S608


# The job's row is locked, before the unit's, by claims of its first unit, by its first claim and by further attempts of
# a unit, since they write it. All other claims leave it alone: of them neither a new version of the row nor an event
# says anything that the unit's row does not. They do not even read it: a batch's row has a new version for each unit
# that ended, and as long as any transaction is older than those, whoever looks for the latest one steps over all of
# them. Whether a job still waits, and whether it was cancelled, is known from an index of such jobs only
# (ix_jobs_queued, ix_jobs_cancelling). A cancel that commits meanwhile finds the unit claimed, and its worker will
# poll, or ends it: the unit's row decides. Of a unit that was claimed and given back meanwhile, the job would have to
# be written: it is left to the next claim.
# IS TRUE hides conditions from the planner: it would walk the partial indexes of all such rows, since they are small
# whenever it plans for an empty queue.
CLAIM = """
WITH wanted AS MATERIALIZED (
    SELECT id, job_id, lane, ordinal, attempt FROM units {wanted}
), due AS MATERIALIZED (
    SELECT id, job_id, lane, attempt > 0 OR ordinal = 0 OR {is_queued} AS writes_job FROM wanted
), job AS MATERIALIZED (
    SELECT id, state = 'queued' AS starts, attempt FROM jobs
    WHERE id = (SELECT job_id FROM due WHERE writes_job) AND (finished_at IS NULL) IS TRUE
        AND cancel_requested_at IS NULL
    FOR NO KEY UPDATE{skip}
), claimed AS (
    UPDATE units SET state = 'running', attempt = units.attempt + 1, fence = nextval('unit_fence_seq'), worker = $2,
        lease_expires_at = clock_timestamp() + make_interval(secs => $3), started_at = clock_timestamp(),
        progress_at = clock_timestamp(), yield_requested_at = NULL, error = NULL,
        done = NULL, warmup_seconds = NULL, expected_at = NULL
    FROM due LEFT JOIN job ON true
    WHERE units.id = (SELECT id FROM due) AND (job.id IS NOT NULL OR (NOT writes_job AND NOT {is_cancelling}))
        AND units.attempt = (SELECT attempt FROM wanted)
        AND (units.state IN ('queued', 'dispatched')) IS TRUE AND not_before <= clock_timestamp()
    RETURNING units.*, coalesce(starts, false) AS starts, job.attempt AS attempt_before
), started AS (
    UPDATE jobs SET state = 'running', started_at = coalesce(started_at, clock_timestamp()),
        attempt = greatest(jobs.attempt, (SELECT attempt FROM claimed))
    WHERE id = (SELECT job_id FROM claimed WHERE starts OR attempt_before < attempt)
), event AS (
    INSERT INTO job_events (job_id, tenant_id, type, data)
    SELECT job_id, tenant_id, 'claimed', jsonb_build_object('attempt', attempt, 'worker', $2) FROM claimed
    WHERE starts OR attempt > 1
)
SELECT id, job_id, tenant_id, coalesce(kind, (SELECT kind FROM jobs WHERE jobs.id = claimed.job_id)) AS kind,
    attempt, fence, worker, explains IS NOT NULL AS explains, ordinal,
    CASE WHEN starts THEN EXISTS (SELECT FROM webhooks
        WHERE webhooks.tenant_id = claimed.tenant_id AND 'job.started' = ANY (webhooks.events)) END AS has_webhooks
FROM claimed
"""
OF_ITS_JOB = {
    "is_queued": job_is(IS_QUEUED, "wanted"),
    "is_cancelling": job_is(IS_CANCELLING, "due"),
}
CLAIM_UNIT = PreparedStatement(
    "claim_unit",
    "uuid, text, float8",
    CLAIM.format(wanted="WHERE id = $1", skip="", **OF_ITS_JOB),
)
# Only among those of the last seconds: they are reserved for fractions of a second, what is older is dispatched by a
# message, and index entries of ended units, which Postgres keeps while any transaction is older, are not stepped over.
# Nothing is waited for, neither the unit nor its job.
NEXT_RESERVED = """
    WHERE state = 'dispatched' AND rings = 0
        AND (lane, dispatched_at) > ($1, now() - interval '10 seconds') AND (lane, dispatched_at) < ($1, 'infinity')
    ORDER BY lane, dispatched_at, id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
"""
CLAIM_NEXT = PreparedStatement(
    "claim_next",
    "text, text, float8",
    CLAIM.format(wanted=NEXT_RESERVED, skip=" SKIP LOCKED", **OF_ITS_JOB),
)


def claim(session: Session, unit_id: uuid.UUID, worker: str, lease: float) -> Claim | None:
    """Take a lease on the unit. None: it is taken, ended, cancelled, or not due yet."""
    return _claimed(session, CLAIM_UNIT(session, str(unit_id), worker, lease).first())


def claim_next(session: Session, lane: Lane, worker: str, lease: float) -> Claim | None:
    """Take a lease on the next unit reserved for the lane's busy workers (see `jobs/queue/dispatch.py`)."""
    return _claimed(session, CLAIM_NEXT(session, str(lane), worker, lease).first())


def _claimed(session: Session, row: Any) -> Claim | None:
    if row is None:
        return None
    ids = uuid.UUID(str(row.id)), uuid.UUID(str(row.job_id))
    kind = JobKind(row.kind)
    if row.has_webhooks:
        webhooks.emit_job(session, row.tenant_id, ids[1], kind, JobState.RUNNING)
    return Claim(*ids, row.tenant_id, kind, row.attempt, row.fence, row.worker, row.explains, row.ordinal)


# One round trip, since each worker polls several times a second. Only the unit's row is locked, and only to renew the
# lease, so that a busy job never delays it.
POLLED = """
WITH renewed AS (
    UPDATE units SET lease_expires_at = clock_timestamp() + make_interval(secs => $4)
    WHERE id = $1 AND fence = $2 AND worker = $3 AND state = 'running' AND $4 > 0
    RETURNING id
)
SELECT {is_cancelling}, units.yield_requested_at IS NOT NULL
FROM units
WHERE units.id = $1 AND units.fence = $2 AND units.worker = $3 AND units.state = 'running'
    AND ($4 = 0 OR EXISTS (SELECT FROM renewed))
"""
POLL = PreparedStatement(
    "poll_unit", "uuid, int8, text, float8", POLLED.format(is_cancelling=job_is(IS_CANCELLING, "units"))
)


def beat(session: Session, claim: Claim, lease: float) -> UnitStatus:
    """Renew the lease for so many seconds, and return the unit's status for its holder."""
    return _poll(session, claim, lease)


def poll_status(session: Session, claim: Claim) -> UnitStatus:
    """The unit's status for its holder: a read by its primary key."""
    return _poll(session, claim, 0)


def _poll(session: Session, claim: Claim, lease: float) -> UnitStatus:
    row = POLL(session, str(claim.unit_id), claim.fence, claim.worker, lease).first()
    return UnitStatus(False) if row is None else UnitStatus(True, *row)
