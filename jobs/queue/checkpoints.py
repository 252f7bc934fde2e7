"""Checkpoints of trainings: rows that refer to files in the blob store, written under the fence of their attempt."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.events.job_events import record
from jobs.queue.leases import Claim, lock_job, update_held
from jobs.storage.blobs import Blob
from jobs.tables import Checkpoint

KEEP_LATEST = 2
"""The latest, and the previous one in case the latest is broken."""
FOLDER = "checkpoints"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint's file in the store."""

    epoch: int
    path: str
    blob: Blob


def checkpoint_path(claim: Claim, epoch: int) -> str:
    """The checkpoint's path in the store: the fence keeps two attempts apart."""
    return f"{FOLDER}/{claim.job_id}/{claim.fence}-{epoch}.safetensors"


def save(session: Session, claim: Claim, stored: StoredCheckpoint) -> list[str]:
    """Insert a checkpoint and return the paths of those it supersedes: remove their files after the commit.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; remove the file.
    """
    lock_job(session, claim.job_id)
    update_held(session, claim, progress_at=NOW)
    session.add(
        Checkpoint(
            tenant_id=claim.tenant_id,
            job_id=claim.job_id,
            fence=claim.fence,
            epoch=stored.epoch,
            path=stored.path,
            sha256=stored.blob.sha256,
            size=stored.blob.size,
        )
    )
    session.flush()
    record(session, claim.job_id, claim.tenant_id, "checkpoint", {"epoch": stored.epoch, "attempt": claim.attempt})
    old = [row for row in latest(session, claim.job_id) if row.job_id == claim.job_id][KEEP_LATEST:]
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_([row.id for row in old])))
    return [row.path for row in old]


def latest(session: Session, job_id: uuid.UUID, retry_of: uuid.UUID | None = None) -> Sequence[Checkpoint]:
    """The checkpoints of a job and of the job that it retries, latest epoch first."""
    mine = or_(Checkpoint.job_id == job_id, Checkpoint.job_id == retry_of)
    return session.scalars(
        select(Checkpoint).where(mine).order_by(Checkpoint.epoch.desc(), Checkpoint.created_at.desc())
    ).all()


def discard(session: Session, checkpoint_id: uuid.UUID) -> None:
    """Delete the row of a broken checkpoint."""
    session.execute(delete(Checkpoint).where(Checkpoint.id == checkpoint_id))
