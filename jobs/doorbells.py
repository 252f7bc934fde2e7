"""Which units' doorbells are to be rung: the dispatcher's whole view of the tables."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.lifecycle import NOW, seconds
from jobs.states import CLAIMABLE, UNIT_TERMINAL, JobKind, Lane, UnitState
from jobs.tables import Job, Unit


@dataclass(frozen=True)
class Ring:
    """A doorbell to be rung: which unit, on which lane, for which kind of work."""

    unit_id: uuid.UUID
    lane: Lane
    kind: JobKind


def dispatch(session: Session, ring_again: float, per_job: int, limit: int = 100) -> list[Ring]:
    """Mark the units whose doorbell is to be rung now, and return them: publish after the commit.

    Units that nobody claimed in time are rung again, after twice the time at each ring up to eight times it. Rows
    that another dispatcher holds are skipped. At most `per_job` units of a job are rung at the same time.
    """
    patience = seconds(ring_again) * func.least(func.power(2, Unit.rings - 1), 8)
    unclaimed = and_(Unit.state == UnitState.DISPATCHED, Unit.dispatched_at < NOW - patience)
    due = or_(and_(Unit.state == UnitState.QUEUED, Unit.not_before <= NOW), unclaimed)
    first_of_job = Unit.ordinal < _first_unfinished(per_job)
    chosen = select(Unit.id).where(due, first_of_job).order_by(Unit.id).limit(limit).with_for_update(skip_locked=True)
    rows = session.execute(
        update(Unit)
        .where(Unit.id.in_(chosen), Unit.state.in_(CLAIMABLE))
        .values(state=UnitState.DISPATCHED, dispatched_at=NOW, rings=Unit.rings + 1)
        .returning(Unit.id, Unit.lane, select(Job.kind).where(Job.id == Unit.job_id).scalar_subquery().label("kind"))
        .execution_options(synchronize_session=False)
    )
    return [Ring(row.id, Lane(row.lane), JobKind(row.kind)) for row in rows]


def _first_unfinished(per_job: int) -> ColumnElement[int]:
    """The ordinal before which units of the same job may be rung: its `per_job` first unfinished ones."""
    other = Unit.__table__.alias("other")
    first = select(func.min(other.c.ordinal)).where(other.c.job_id == Unit.job_id, other.c.state.not_in(UNIT_TERMINAL))
    return first.correlate(Unit.__table__).scalar_subquery() + per_job


def unring(session: Session, unit_ids: Iterable[uuid.UUID], delay: float) -> None:
    """The doorbell could not be rung: the units wait `delay` seconds for the next try."""
    session.execute(
        update(Unit)
        .where(Unit.id.in_(list(unit_ids)), Unit.state == UnitState.DISPATCHED)
        .values(state=UnitState.QUEUED, rings=0, dispatched_at=None, not_before=NOW + seconds(delay))
        .execution_options(synchronize_session=False)
    )
