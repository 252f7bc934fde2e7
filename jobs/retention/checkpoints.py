"""Retention of checkpoints: kept while their training runs, and as long as a retry could resume from them.

The folders in the store tell what there is, so that those of deleted jobs go as well. The store is asked outside any
transaction.
"""

import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, and_, delete, exists, or_, select
from sqlalchemy.orm import Session, aliased

from jobs.db import Sessions
from jobs.queue.checkpoints import FOLDER
from jobs.retention.batches import older_than
from jobs.settings import Settings
from jobs.states import JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Checkpoint, Job

FOLDERS = 20
"""Folders that are removed in one step: each may hold gigabytes."""
RESUMABLE = (JobState.FAILED, JobState.CANCELLED)


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Remove a batch of checkpoints by RENALQ_CHECKPOINT_DAYS. True: there are more."""
    stored = [job_id for name in store.entries(FOLDER) if (job_id := _id(name)) is not None]
    with sessions.begin() as session:
        released = release(session, stored, settings.checkpoint_days)
    for job_id in released:  # after the commit: a retry finds a row only while its file is there
        store.remove_folder(f"{FOLDER}/{job_id}")
    return len(released) == FOLDERS


def release(session: Session, job_ids: Sequence[uuid.UUID], days: float) -> list[uuid.UUID]:
    """Delete the rows of checkpoints that nothing needs, of up to `FOLDERS` of these jobs. Returns those jobs."""
    needed = _ids(session, job_ids, _is_needed(days))
    unneeded = [job_id for job_id in job_ids if job_id not in needed][:FOLDERS]
    locked = select(Job.id).where(Job.id.in_(unneeded)).with_for_update(of=Job, key_share=True, skip_locked=True)
    free = set(session.scalars(locked))
    # A retry may have been submitted before the lock, or is being submitted: it keeps them.
    still_needed = _ids(session, unneeded, or_(Job.id.not_in(free), _is_needed(days)))
    released = [job_id for job_id in unneeded if job_id not in still_needed]
    session.execute(delete(Checkpoint).where(Checkpoint.job_id.in_(released)))
    return released


def _ids(session: Session, job_ids: Iterable[uuid.UUID], which: ColumnElement[bool]) -> set[uuid.UUID]:
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), which)))


def _is_needed(days: float) -> ColumnElement[bool]:
    """A job has one retry at most: while it runs it may resume, and after it nothing can."""
    retry = aliased(Job)
    being_retried = exists().where(retry.retry_of == Job.id, retry.finished_at.is_(None))
    can_be_retried = and_(Job.state.in_(RESUMABLE), ~exists().where(retry.retry_of == Job.id))
    if days:
        can_be_retried = and_(can_be_retried, ~older_than(Job.finished_at, days))
    return or_(Job.finished_at.is_(None), being_retried, can_be_retried)


def _id(folder: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(folder)
    except ValueError:
        return None
