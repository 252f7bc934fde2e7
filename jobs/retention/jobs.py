"""Deletion of ended jobs with all that belongs to them, whether retention or a client asks for it.

Order: results and artifacts, units, events, then the row. Events go oldest first, so that a reader who finds the first
one has read all of them (`jobs.queue.kept`).
"""

import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, insert, literal, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased
from sqlalchemy.types import Uuid

from jobs.db import NOW, Sessions, seconds
from jobs.deletions import receipts
from jobs.retention.batches import ROWS, delete_some, older_than
from jobs.settings import Settings
from jobs.states import PREDICTIONS
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Dataset, Job, JobEvent, ModelVersion, ReleasedRun, ScanResult, Unit

JOBS = 200
"""Jobs per transaction."""
_Later = aliased(Job)
REFERRERS: Sequence[InstrumentedAttribute[uuid.UUID | None]] = (
    ModelVersion.job_id,
    Dataset.job_id,
    _Later.retry_of,
    _Later.reproduction_of,
)
"""What keeps a job from retention: the version it trained, the dataset it checked, a job that retries or reproduces
it."""
Key = tuple[InstrumentedAttribute[Any], ...]
CHILDREN: dict[str, Key] = {
    "results": (ScanResult.job_id, ScanResult.ordinal),
    "artifacts": (Artifact.job_id, Artifact.name),
    "units": (Unit.job_id, Unit.ordinal),
    "events": (JobEvent.job_id, JobEvent.id),
}
"""What goes before a job, in this order: what there may be many of. Checkpoints go with the row."""
LIVE_RUN_SECONDS = 300.0
"""Longer than a worker goes on writing to MLflow after a training's end (s)."""


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
    gone = delete_rows(session, job_ids, rows)
    return gone["jobs"] < len(job_ids) or len(job_ids) == JOBS


def delete_rows(
    session: Session, job_ids: Sequence[uuid.UUID], rows: int = ROWS, deletion_id: uuid.UUID | None = None, **also: Key
) -> Counter[str]:
    """Delete up to `rows` rows of these jobs, children first, and the jobs that have none left. The jobs must be locked
    FOR UPDATE: nothing new can refer to them then. Returns how many went, by kind.

    Args:
        deletion_id: whose receipt waits for the runs in MLflow.
        also: further children, by kind: their keys, which begin with the job.
    """
    children, gone = {**also, **CHILDREN}, Counter[str]()
    for name, key in children.items():
        if left := rows - gone.total():
            gone[name] = delete_some(session, key, job_ids, left)
    if gone.total() < rows:
        gone["jobs"] = _delete_emptied(session, job_ids, children.values(), deletion_id)
    return gone


def oldest(days: float) -> Select[uuid.UUID]:
    """The next jobs to delete. The index ix_jobs_deletable has this condition."""
    emptied = or_(Job.kind.not_in(PREDICTIONS), Job.results_expired_at.is_not(None))
    old = and_(older_than(Job.finished_at, days), emptied, _is_unneeded(), ~receipts.is_hidden(Job.tenant_id))
    return select(Job.id).where(old).order_by(Job.finished_at, Job.id).limit(JOBS)


def _lock_old_jobs(session: Session, days: float) -> Sequence[uuid.UUID]:
    locked = session.scalars(oldest(days).with_for_update(of=Job, skip_locked=True)).all()
    # A retry may have committed after that statement began. While the lock is held, no other can.
    return session.scalars(select(Job.id).where(Job.id.in_(locked), _is_unneeded())).all()


def _is_unneeded() -> ColumnElement[bool]:
    return and_(*(~exists().where(column == Job.id) for column in REFERRERS))


def _delete_emptied(
    session: Session, job_ids: Sequence[uuid.UUID], children: Iterable[Key], deletion_id: uuid.UUID | None
) -> int:
    emptied = and_(*(_first(key).is_(None) for key in children))
    gone = session.scalars(select(Job.id).where(Job.id.in_(job_ids), emptied)).all()
    _release_runs(session, gone, deletion_id)
    session.execute(delete(Job).where(Job.id.in_(gone)).execution_options(synchronize_session=False))
    return len(gone)


def _first(key: Key) -> Any:
    """SQL: the job's first row by this key, or null. The order makes Postgres use the index; see `kept.first`."""
    return select(key[1]).where(key[0] == Job.id).order_by(*key).limit(1).scalar_subquery()


def _release_runs(session: Session, job_ids: Sequence[uuid.UUID], deletion_id: uuid.UUID | None) -> None:
    """Have the runs of these trainings deleted in MLflow, once no process can write to them any more."""
    after_end = Job.finished_at + seconds(LIVE_RUN_SECONDS)
    due_at = func.greatest(NOW, after_end, func.coalesce(Job.track_after, after_end))
    runs = select(Job.id, Job.mlflow_run_id, literal(deletion_id, Uuid), due_at)
    runs = runs.where(Job.id.in_(job_ids), Job.mlflow_run_id.is_not(None))
    session.execute(insert(ReleasedRun).from_select(["job_id", "run_id", "deletion_id", "due_at"], runs))
