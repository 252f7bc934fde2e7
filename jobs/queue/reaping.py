"""Take back units whose worker has died or makes no progress."""

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, or_, select, text
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import LeaseLost
from jobs.queue.completion import finish_job_if_done
from jobs.queue.leases import Claim, is_held, lock_job, update_held
from jobs.queue.lifecycle import RetryPolicy, fail_guarded
from jobs.queue.outcomes import count_failure, finish_items
from jobs.states import JobKind, ResultState, UnitState
from jobs.tables import Job, Json, Unit

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
LOCK_TIMEOUT = text("SET LOCAL lock_timeout TO '500ms'")


def held_by(session: Session, holders: str) -> Sequence[Row[uuid.UUID, int | None, str | None]]:
    """The running units of a node or of one of its instances (`jobs.queue.processes`): id, fence and worker."""
    theirs = Unit.worker.startswith(f"{holders}/", autoescape=True)
    held = select(Unit.id, Unit.fence, Unit.worker).where(Unit.state == UnitState.RUNNING, theirs)
    return session.execute(held).all()


def take_back(session: Session, unit_id: uuid.UUID, fence: int | None, retry: RetryPolicy) -> bool:
    """Take back a unit whose holder is known to have died, before its lease expires. False: it is not held any more."""
    session.execute(LOCK_TIMEOUT)
    row = session.execute(_running().where(Unit.id == unit_id, Unit.fence == fence)).first()
    return row is not None and _reap_one(session, row, literal(True), WORKER_LOST, retry)


def reap(session: Session, *, retry: RetryPolicy, stall: float) -> int:
    """Take back one unit whose lease has expired, or that made no progress for `stall` seconds.

    State, fence AND expiry are checked again in the UPDATE, since the worker may beat or finish in between. Returns the
    number of units taken back, 0 or 1: one job per transaction.

    Raises:
        OperationalError: the job or the unit stayed locked for 500 ms.
    """
    session.execute(LOCK_TIMEOUT)
    lost = or_(Unit.lease_expires_at < NOW, Unit.progress_at < NOW - seconds(stall))
    # In random order: one that is refused each time must not hide the others.
    row = session.execute(_running().where(lost).order_by(func.random()).limit(1)).first()
    if row is None:
        return 0
    return int(_reap_one(session, row, lost, WORKER_LOST if row.expired else STALLED, retry))


def _running() -> Select[Any]:
    return (
        select(Unit.id, Unit.job_id, Unit.tenant_id, Unit.attempt, Unit.fence, Unit.worker)
        .add_columns(Job.kind, Job.cancel_requested_at, (Unit.lease_expires_at < NOW).label("expired"))
        .join(Job, Job.id == Unit.job_id)
        .where(Unit.state == UnitState.RUNNING)
    )


def _reap_one(session: Session, row: Any, lost: ColumnElement[bool], error: Json, retry: RetryPolicy) -> bool:
    claim = Claim(row.id, row.job_id, row.tenant_id, JobKind(row.kind), row.attempt, row.fence, row.worker)
    lock_job(session, claim.job_id)
    try:
        if row.cancel_requested_at is not None:
            _cancel_reaped(session, claim, lost, error)
        else:
            fail_guarded(session, claim, error, retry, and_(is_held(claim), lost))
    except LeaseLost:
        return False
    return True


def _cancel_reaped(session: Session, claim: Claim, lost: ColumnElement[bool], error: Json) -> None:
    """A cancelled job need not wait for another worker only to stop it."""
    update_held(session, claim, lost, state=UnitState.CANCELLED, finished_at=NOW, lease_expires_at=None)
    finish_items(session, claim, ResultState.CANCELLED, None)
    count_failure(session, claim, error, retried=False)
    finish_job_if_done(session, claim.job_id)
