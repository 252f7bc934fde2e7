"""Results that are kept for a time only: found when they are over it, deleted in bites, and missed by nobody unawares.

A job's first result goes first, and its mark (`results_expired_at`) comes with its last one. So whoever has read
results and then finds the first one still there, and no mark, has read them whole: `require_kept`.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, literal, select, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from jobs.db import NOW, seconds
from jobs.errors import ResultsExpired
from jobs.queue.explanations import FOLDER
from jobs.states import PREDICTIONS
from jobs.tables import Artifact, Job, JobEvent, ScanResult

EXPLAINS = Artifact.name.startswith(FOLDER)
"""An artifact is an explanation."""
ROWS = 2000
"""Most results that one transaction deletes: the dispatcher, whose work it is, rings nobody meanwhile."""
JOBS = 200
"""Most jobs that one transaction deletes results of."""
DAY = 24 * 3600.0


def require_kept(session: Session, job_id: uuid.UUID) -> None:
    """Ask this after results were read: what was deleted by then is missed in what was read.

    Raises:
        ResultsExpired
    """
    if not are_kept(session, job_id):
        raise ResultsExpired


def are_kept(session: Session, job_id: uuid.UUID) -> bool:
    """Whether all results of the job are here: none of them was deleted."""
    first_is_here = func.coalesce(_first(ScanResult.ordinal), 0) == 0
    kept = select(and_(Job.results_expired_at.is_(None), first_is_here)).where(Job.id == job_id)
    return bool(session.scalar(kept))


def expire(session: Session, days: float, rows: int = ROWS) -> bool:
    """Delete a bite of what predictions that ended more than `days` ago have brought forth. True: there is more.

    A job that somebody else is busy with is passed over.
    """
    job_ids = _over(session, days)
    if not job_ids:
        return False
    results, explanations = ScanResult.job_id.in_(job_ids), and_(Artifact.job_id.in_(job_ids), EXPLAINS)
    _delete(session, (ScanResult.job_id, ScanResult.ordinal), results, rows)
    _delete(session, (Artifact.job_id, Artifact.name), explanations, rows)
    ended = _emptied(session, job_ids)
    _mark(session, ended)
    return len(ended) < len(job_ids) or len(job_ids) == JOBS


def _first(column: InstrumentedAttribute[Any], *which: ColumnElement[bool]) -> Any:
    """The lowest of a job's rows, null without one. Unlike EXISTS, it is always looked up in the index."""
    return select(func.min(column)).where(column.class_.job_id == Job.id, *which).scalar_subquery()


def _over(session: Session, days: float) -> Sequence[uuid.UUID]:
    # now(), not clock_timestamp(): an index is searched for what stays the same in the course of a statement.
    over = Job.finished_at < func.now() - seconds(days * DAY)
    old = select(Job.id).where(Job.kind.in_(PREDICTIONS), Job.results_expired_at.is_(None), over)
    oldest = old.order_by(Job.finished_at, Job.id).limit(JOBS)
    return session.scalars(oldest.with_for_update(of=Job, key_share=True, skip_locked=True)).all()


def _delete(
    session: Session, key: tuple[InstrumentedAttribute[Any], ...], which: ColumnElement[bool], rows: int
) -> None:
    # In the order of the key: a job never loses a later result before its first.
    some = select(*key).where(which).order_by(*key).limit(rows)
    session.execute(delete(key[0].class_).where(tuple_(*key).in_(some)).execution_options(synchronize_session=False))


def _emptied(session: Session, job_ids: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
    nothing_left = and_(_first(ScanResult.ordinal).is_(None), _first(Artifact.name, EXPLAINS).is_(None))
    return session.scalars(select(Job.id).where(Job.id.in_(job_ids), nothing_left)).all()


def _mark(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    told = select(Job.id, Job.tenant_id, literal("results_expired"), func.jsonb_build_object("total", Job.total))
    names = ["job_id", "tenant_id", "type", "data"]
    session.execute(insert(JobEvent).from_select(names, told.where(Job.id.in_(job_ids))))
    marked = update(Job).where(Job.id.in_(job_ids)).values(results_expired_at=NOW)
    session.execute(marked.execution_options(synchronize_session=False))
