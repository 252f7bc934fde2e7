"""Retention of jobs: an ended job is deleted with all that belongs to it, once nothing that is kept refers to it.

Order: results and explanations (`jobs.retention.results`), units, events, then the row. Events go oldest first, so that
a reader who finds the first one has read all of them (`jobs.queue.kept`).
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, and_, delete, exists, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from jobs.db import Sessions
from jobs.queue.kept import first
from jobs.retention.batches import ROWS, delete_some, older_than
from jobs.settings import Settings
from jobs.states import PREDICTIONS
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Dataset, Job, JobEvent, ModelVersion, Unit

JOBS = 200
"""Jobs per transaction."""
_Later = aliased(Job)
REFERRERS: Sequence[InstrumentedAttribute[uuid.UUID | None]] = (
    ModelVersion.job_id,
    Dataset.job_id,
    _Later.retry_of,
    _Later.reproduction_of,
)
"""What keeps a job: the version it trained, the dataset it checked, a job that retries or reproduces it."""


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Delete a batch by RENALQ_JOB_DAYS. True: there are more."""
    if not settings.job_days:
        return False
    with sessions.begin() as session:
        return delete_jobs(session, settings.job_days)


def delete_jobs(session: Session, days: float, rows: int = ROWS) -> bool:
    """Delete jobs that ended more than `days` ago, or up to `rows` of their units and events. True: there are more.

    Locked jobs are skipped.
    """
    job_ids = _lock_old_jobs(session, days)
    if not job_ids:
        return False
    left = rows - delete_some(session, Unit, (Unit.job_id, Unit.ordinal), job_ids, rows)
    if left:
        left -= delete_some(session, JobEvent, (JobEvent.job_id, JobEvent.id), job_ids, left)
    gone = _delete_emptied(session, job_ids) if left else 0
    return gone < len(job_ids) or len(job_ids) == JOBS


def oldest(days: float) -> Select[uuid.UUID]:
    """The next jobs to delete. The index ix_jobs_deletable has this condition."""
    emptied = or_(Job.kind.not_in(PREDICTIONS), Job.results_expired_at.is_not(None))
    old = and_(older_than(Job.finished_at, days), emptied, _is_unneeded())
    return select(Job.id).where(old).order_by(Job.finished_at, Job.id).limit(JOBS)


def _lock_old_jobs(session: Session, days: float) -> Sequence[uuid.UUID]:
    locked = session.scalars(oldest(days).with_for_update(of=Job, skip_locked=True)).all()
    # A retry may have committed after that statement began. While the lock is held, no other can.
    return session.scalars(select(Job.id).where(Job.id.in_(locked), _is_unneeded())).all()


def _is_unneeded() -> ColumnElement[bool]:
    return and_(*(~exists().where(column == Job.id) for column in REFERRERS))


def _delete_emptied(session: Session, job_ids: Sequence[uuid.UUID]) -> int:
    """Delete the jobs without units and events. Their other rows are few: artifacts and checkpoints of trainings."""
    emptied = and_(first(Unit.ordinal).is_(None), first(JobEvent.id).is_(None))
    gone = session.scalars(select(Job.id).where(Job.id.in_(job_ids), emptied)).all()
    for table, job_id in ((Artifact, Artifact.job_id), (Job, Job.id)):
        session.execute(delete(table).where(job_id.in_(gone)).execution_options(synchronize_session=False))
    return len(gone)
