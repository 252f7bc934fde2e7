"""A training's checkpoints: rows that name files in the store, written under the fence of their attempt."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.queue.job_events import record
from jobs.queue.leases import Claim, lock_job, require_held
from jobs.states import JobState
from jobs.storage.blobs import Artifacts, Blob
from jobs.tables import Checkpoint, Job

KEPT = 2
"""The latest, and the one before it, should the latest turn out to be broken."""
FOLDER = "checkpoints"
KEPT_AFTER_FAILURE = 7 * 24 * 3600.0
"""Seconds for which a failed training can be retried from where it was."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint's file in the store."""

    epoch: int
    path: str
    blob: Blob


def path_of(held: Claim, epoch: int) -> str:
    """Where the attempt puts its checkpoint: the fence keeps two attempts apart."""
    return f"{FOLDER}/{held.job_id}/{held.fence}-{epoch}.safetensors"


def keep(session: Session, held: Claim, stored: Stored) -> list[str]:
    """Write down a checkpoint; return the paths of those that are no longer kept: remove them after the commit.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; the file is nobody's.
    """
    lock_job(session, held.job_id)
    require_held(session, held, progress_at=NOW)
    session.add(
        Checkpoint(
            tenant_id=held.tenant_id,
            job_id=held.job_id,
            fence=held.fence,
            epoch=stored.epoch,
            path=stored.path,
            sha256=stored.blob.sha256,
            size=stored.blob.size,
        )
    )
    session.flush()
    record(session, held.job_id, held.tenant_id, "checkpoint", {"epoch": stored.epoch, "attempt": held.attempt})
    old = [row for row in latest(session, held.job_id) if row.job_id == held.job_id][KEPT:]
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_([row.id for row in old])))
    return [row.path for row in old]


def latest(session: Session, job_id: uuid.UUID, retry_of: uuid.UUID | None = None) -> Sequence[Checkpoint]:
    """The checkpoints of a job, and of the one that it retries: the furthest first."""
    mine = or_(Checkpoint.job_id == job_id, Checkpoint.job_id == retry_of)
    return session.scalars(
        select(Checkpoint).where(mine).order_by(Checkpoint.epoch.desc(), Checkpoint.created_at.desc())
    ).all()


def discard(session: Session, checkpoint_id: uuid.UUID) -> None:
    """Forget a checkpoint that is broken."""
    session.execute(delete(Checkpoint).where(Checkpoint.id == checkpoint_id))


def prune(session: Session, store: Artifacts) -> int:
    """Remove the checkpoints of jobs that need them no more, and files of jobs that are gone.

    A failed training's are kept for a week: its retry goes on from them. Returns how many jobs' were removed.
    """
    stored = {folder: job_id for folder in store.folders(FOLDER) if (job_id := _id(folder)) is not None}
    fresh_failure = (Job.state == JobState.FAILED) & (Job.finished_at > NOW - seconds(KEPT_AFTER_FAILURE))
    needed = set(
        session.scalars(
            select(Job.id).where(Job.id.in_(stored.values()), or_(Job.finished_at.is_(None), fresh_failure))
        )
    )
    over = {folder: job_id for folder, job_id in stored.items() if job_id not in needed}
    session.execute(delete(Checkpoint).where(Checkpoint.job_id.in_(over.values())))
    for folder in over:
        store.remove_folder(f"{FOLDER}/{folder}")
    return len(over)


def _id(folder: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(folder)
    except ValueError:
        return None
