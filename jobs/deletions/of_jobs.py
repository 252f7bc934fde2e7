"""Deletion of an ended job on request: it disappears at once, and its rows and files go in the background."""

import uuid
from collections.abc import Sequence

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.db import NOW
from jobs.deletions import receipts
from jobs.errors import JobNotFound, StillNeeded, WrongState
from jobs.tables import Dataset, Deletion, DeletionKind, Job, ModelVersion


def delete_job(
    session: Session, tenant_id: str, job_id: uuid.UUID, by_key: uuid.UUID | None = None, with_scans: bool = True
) -> Deletion:
    """Delete an ended job with all that belongs to it. Idempotent.

    Args:
        with_scans: also its scans that no other result and no feedback needs.

    Raises:
        JobNotFound
        WrongState: it has not ended.
        StillNeeded: something that it made, or a job that continues it, needs it.
    """
    forget_answers(session, tenant_id, [job_id])
    mine = Job.id == job_id, Job.tenant_id == tenant_id
    # FOR UPDATE, not NO KEY UPDATE: nothing new may refer to it, neither a retry nor feedback.
    job = session.scalar(select(Job).where(*mine).with_for_update(of=Job))
    if job is None:
        return receipts.repeated(session, tenant_id, DeletionKind.JOB, job_id, JobNotFound)
    _require_unneeded(session, job)
    require_no_continuation(session, job.id)
    deletion = receipts.begin(session, tenant_id, DeletionKind.JOB, job_id, by_key, with_scans=with_scans)
    hide(session, deletion, [job.id])
    return deletion


def forget_answers(session: Session, tenant_id: str, job_ids: Sequence[uuid.UUID]) -> None:
    """Delete the stored responses that show these jobs. Before the jobs are locked: see `jobs.queue.lifecycle`."""
    mine = Job.id.in_(job_ids), Job.tenant_id == tenant_id, Job.idempotency_key.is_not(None)
    keys = session.scalars(select(Job.idempotency_key).where(*mine)).all()
    idempotency.forget(session, tenant_id, job_ids, [key for key in keys if key])


def hide(session: Session, deletion: Deletion, job_ids: Sequence[uuid.UUID]) -> None:
    """Move locked jobs to where no request finds them. MLflow's backfill passes them by, too."""
    hidden = {"tenant_id": receipts.hidden_tenant(deletion.id), "idempotency_key": None}
    moved = update(Job).where(Job.id.in_(job_ids)).values(**hidden, tracked_at=func.coalesce(Job.tracked_at, NOW))
    session.execute(moved.execution_options(synchronize_session=False))


def require_no_continuation(session: Session, job_id: uuid.UUID) -> None:
    """Refuse while an unfinished job retries or reproduces this one.

    Raises:
        StillNeeded
    """
    continues = or_(Job.retry_of == job_id, Job.reproduction_of == job_id)
    other = session.scalar(select(Job.id).where(continues, Job.finished_at.is_(None)).limit(1))
    if other is not None:
        raise StillNeeded(f"Job {other} continues it. Wait for its end, or cancel it, and then delete this.")


def _require_unneeded(session: Session, job: Job) -> None:
    if job.finished_at is None:
        raise WrongState(
            f"The job is {job.state}. Cancel it with POST /jobs/{job.id}/cancel, and delete it at its end."
        )
    version = session.scalar(select(ModelVersion.version).where(ModelVersion.job_id == job.id))
    if version is not None:
        raise StillNeeded(f"This training made version {version}. DELETE /models/{version} deletes both.")
    dataset = session.scalar(select(Dataset.id).where(Dataset.job_id == job.id))
    if dataset is not None:
        raise StillNeeded(f"This job checked a dataset that is stored. DELETE /datasets/{dataset} deletes both.")
