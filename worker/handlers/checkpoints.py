"""Checkpoints of a training: which one the child resumes from, and how new ones are stored."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from jobs.queue import checkpoints, lifecycle
from jobs.results import queries
from jobs.tables import Checkpoint, Job
from ml.runtime import events
from worker.execution.unit import UnitLease

log = structlog.get_logger()


class CheckpointRefused(Exception):
    """The child does not accept this checkpoint: it is of another training, or of another version of the code."""


def candidates(unit: UnitLease, rows: Sequence[Checkpoint], folder: Path) -> Iterator[Path | None]:
    """Files to resume from, the latest epoch first; then None, the beginning. Asking for the next discards one."""
    for row in rows:
        path = unit.resources.artifacts.fetch_named(row.path, row.sha256, folder)
        if path is not None:
            log.info("resuming", epoch=row.epoch)
            yield path
        log.error("checkpoint_discarded", epoch=row.epoch, whole=path is not None)
        unit.in_transaction(lambda session, row=row: checkpoints.discard(session, row.id))  # type: ignore[misc]
    yield None


def store(unit: UnitLease, event: events.Checkpointed) -> None:
    """Store the child's file; only then a row names it. A full disk does not fail the training."""
    store = unit.resources.artifacts
    path = checkpoints.checkpoint_path(unit.claim, event.epoch)
    try:
        stored = checkpoints.StoredCheckpoint(event.epoch, path, store.move_in(Path(event.path), path))
    except OSError as error:
        log.error("checkpoint_not_stored", epoch=event.epoch, error=type(error).__name__)
        return
    for old in unit.in_transaction(lambda session: checkpoints.save(session, unit.claim, stored)):
        store.remove_named(old)


def record_resume(unit: UnitLease, epoch: int) -> None:
    """Report that the training was resumed. A retry is another job, so it copies the epochs of the retried one."""
    unit.report(event=("resumed", {"epoch": epoch}))

    def copy_epochs(session: Session) -> None:
        retry_of = session.get_one(Job, unit.claim.job_id).retry_of
        if retry_of is not None and not queries.epochs(session, unit.claim.job_id):
            for data in queries.epochs(session, retry_of)[:epoch]:
                lifecycle.report(session, unit.claim, event=("epoch", data))

    unit.in_transaction(copy_epochs)
