"""Units under lease: claimed, renewed, fenced, and added."""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Prepared, seconds
from jobs.errors import LeaseLost
from jobs.states import JobKind, Lane, UnitState
from jobs.tables import Job, Unit, new_id


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


def add_unit(session: Session, held: Claim, **values: Any) -> uuid.UUID:
    """One more unit of the job, after all that it has; its id."""
    of_job = select(func.max(Unit.ordinal) + 1, func.max(Unit.lane)).where(Unit.job_id == held.job_id)
    ordinal, lane = session.execute(of_job).one()
    unit_id = new_id()
    own = {"id": unit_id, "tenant_id": held.tenant_id, "job_id": held.job_id, "ordinal": ordinal, "lane": lane}
    session.execute(insert(Unit).values(**own, **values))
    return unit_id


@dataclass(frozen=True)
class Standing:
    """What a worker learns of its unit: whether it still holds it, and whether the work is still wanted of it."""

    held: bool
    cancel_requested: bool = False
    yield_requested: bool = False


# Locks the job, then the unit, like every verb. What both waited for is seen: an UPDATE looks at the latest row again.
CLAIM = """
WITH wanted AS ({wanted}), job AS MATERIALIZED (
    SELECT jobs.id, jobs.kind, jobs.tenant_id, wanted.id AS unit_id
    FROM wanted JOIN jobs ON jobs.id = wanted.job_id
    WHERE jobs.finished_at IS NULL AND jobs.cancel_requested_at IS NULL
    FOR NO KEY UPDATE OF jobs{skip}
), claimed AS (
    UPDATE units SET state = 'running', attempt = attempt + 1, fence = nextval('unit_fence_seq'), worker = $2,
        lease_expires_at = clock_timestamp() + make_interval(secs => $3), started_at = clock_timestamp(),
        progress_at = clock_timestamp(), yield_requested_at = NULL, error = NULL
    FROM job
    WHERE units.id = job.unit_id AND state IN ('queued', 'dispatched') AND not_before <= clock_timestamp()
    RETURNING units.id AS unit_id, job.id AS job_id, job.tenant_id, job.kind, attempt, fence, worker,
        explains IS NOT NULL AS explains
), started AS (
    UPDATE jobs SET state = 'running', started_at = coalesce(started_at, clock_timestamp()),
        attempt = greatest(jobs.attempt, claimed.attempt)
    FROM claimed WHERE jobs.id = claimed.job_id
), told AS (
    INSERT INTO job_events (job_id, tenant_id, type, data)
    SELECT job_id, tenant_id, 'claimed', jsonb_build_object('attempt', attempt, 'worker', $2) FROM claimed
)
SELECT unit_id, job_id, tenant_id, kind, attempt, fence, worker, explains FROM claimed
"""


CLAIM_UNIT = Prepared(
    "claim_unit",
    "uuid, text, float8",
    CLAIM.format(wanted="SELECT id, job_id FROM units WHERE id = $1", skip=""),
)


PROMISED = """
SELECT id, job_id FROM units WHERE state = 'dispatched' AND lane = $1 AND rings = 0 ORDER BY dispatched_at, id LIMIT 1
"""


CLAIM_NEXT = Prepared(
    "claim_next",
    "text, text, float8",
    CLAIM.format(wanted=PROMISED, skip=" SKIP LOCKED"),
)


def claim(session: Session, unit_id: uuid.UUID, worker: str, lease: float) -> Claim | None:
    """Take the unit under lease. None means refused: it is taken, ended, cancelled, or not due yet."""
    return _claimed(CLAIM_UNIT(session, str(unit_id), worker, lease).first())


def claim_next(session: Session, lane: Lane, worker: str, lease: float) -> Claim | None:
    """Take the next unit that the dispatcher has promised to the lane's busy workers (see `jobs/queue/dispatch.py`)."""
    return _claimed(CLAIM_NEXT(session, str(lane), worker, lease).first())


def _claimed(row: Any) -> Claim | None:
    if row is None:
        return None
    ids = uuid.UUID(str(row.unit_id)), uuid.UUID(str(row.job_id))
    return Claim(*ids, row.tenant_id, JobKind(row.kind), row.attempt, row.fence, row.worker, row.explains)


def beat(session: Session, held: Claim, lease: float) -> bool:
    """Renew the lease; False: it is lost. It touches the unit's row alone, so that a busy job never delays it."""
    try:
        require_held(session, held, lease_expires_at=NOW + seconds(lease))
    except LeaseLost:
        return False
    return True


def standing(session: Session, held: Claim) -> Standing:
    """How the unit stands for its holder: a read by two primary keys."""
    row = session.execute(
        select(Job.cancel_requested_at.is_not(None), Unit.yield_requested_at.is_not(None))
        .join(Job, Job.id == Unit.job_id)
        .where(holds(held))
    ).first()
    return Standing(False) if row is None else Standing(True, *row)
