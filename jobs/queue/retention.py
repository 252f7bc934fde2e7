"""Retention of results: find expired ones, delete them in batches, and detect reads that overlap a deletion.

A job's results are deleted in order, and `results_expired_at` is set with the last batch. So a reader that finds the
first result still present and no mark, after its read, has read all results: `require_kept`.
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

IS_EXPLANATION = Artifact.name.startswith(FOLDER)
"""SQL: the artifact belongs to an explanation."""
BATCH_ROWS = 2000
"""Rows per transaction: the dispatcher deletes them, and dispatches nothing meanwhile."""
BATCH_JOBS = 200
"""Jobs per transaction."""
DAY = 24 * 3600.0


def require_kept(session: Session, job_id: uuid.UUID) -> None:
    """Call this after reading results: they may have been deleted in between.

    Raises:
        ResultsExpired
    """
    if not are_kept(session, job_id):
        raise ResultsExpired


def are_kept(session: Session, job_id: uuid.UUID) -> bool:
    """Whether no result of the job was deleted."""
    first_is_here = func.coalesce(_first(ScanResult.ordinal), 0) == 0
    kept = select(and_(Job.results_expired_at.is_(None), first_is_here)).where(Job.id == job_id)
    return bool(session.scalar(kept))


def expire(session: Session, days: float, rows: int = BATCH_ROWS) -> bool:
    """Delete a batch of results and explanations of predictions that ended more than `days` ago. True: there are more.

    Locked jobs are skipped.
    """
    job_ids = _expired_jobs(session, days)
    if not job_ids:
        return False
    results, explanations = ScanResult.job_id.in_(job_ids), and_(Artifact.job_id.in_(job_ids), IS_EXPLANATION)
    _delete(session, (ScanResult.job_id, ScanResult.ordinal), results, rows)
    _delete(session, (Artifact.job_id, Artifact.name), explanations, rows)
    ended = _emptied(session, job_ids)
    _mark_expired(session, ended)
    return len(ended) < len(job_ids) or len(job_ids) == BATCH_JOBS


def _first(column: InstrumentedAttribute[Any], *which: ColumnElement[bool]) -> Any:
    """The minimum of the column over the job's rows, or null. Unlike EXISTS, this always uses the index."""
    return select(func.min(column)).where(column.class_.job_id == Job.id, *which).scalar_subquery()


def _expired_jobs(session: Session, days: float) -> Sequence[uuid.UUID]:
    # now(), not clock_timestamp(): only a stable value can be searched for in an index.
    over = Job.finished_at < func.now() - seconds(days * DAY)
    old = select(Job.id).where(Job.kind.in_(PREDICTIONS), Job.results_expired_at.is_(None), over)
    oldest = old.order_by(Job.finished_at, Job.id).limit(BATCH_JOBS)
    return session.scalars(oldest.with_for_update(of=Job, key_share=True, skip_locked=True)).all()


def _delete(
    session: Session, key: tuple[InstrumentedAttribute[Any], ...], which: ColumnElement[bool], rows: int
) -> None:
    # In the order of the key, so that the first result is deleted first.
    some = select(*key).where(which).order_by(*key).limit(rows)
    session.execute(delete(key[0].class_).where(tuple_(*key).in_(some)).execution_options(synchronize_session=False))


def _emptied(session: Session, job_ids: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
    nothing_left = and_(_first(ScanResult.ordinal).is_(None), _first(Artifact.name, IS_EXPLANATION).is_(None))
    return session.scalars(select(Job.id).where(Job.id.in_(job_ids), nothing_left)).all()


def _mark_expired(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    events = select(Job.id, Job.tenant_id, literal("results_expired"), func.jsonb_build_object("total", Job.total))
    names = ["job_id", "tenant_id", "type", "data"]
    session.execute(insert(JobEvent).from_select(names, events.where(Job.id.in_(job_ids))))
    marked = update(Job).where(Job.id.in_(job_ids)).values(results_expired_at=NOW)
    session.execute(marked.execution_options(synchronize_session=False))
