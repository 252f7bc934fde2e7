"""Checkpoints between a training's child and the store: which to go on from, and where the next ones go."""

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
    """The child will not go on from this checkpoint: it is of another training, or of another version of our code."""


def candidates(unit: UnitLease, rows: Sequence[Checkpoint], folder: Path) -> Iterator[Path | None]:
    """Files to go on from, the furthest first; then None, the beginning. Whoever asks for the next has refused one."""
    for row in rows:
        path = unit.resources.artifacts.fetch_named(row.path, row.sha256, folder)
        if path is not None:
            log.info("resuming", epoch=row.epoch)
            yield path
        log.error("checkpoint_discarded", epoch=row.epoch, whole=path is not None)
        unit.in_transaction(lambda session, row=row: checkpoints.discard(session, row.id))  # type: ignore[misc]
    yield None


def store(unit: UnitLease, said: events.Checkpointed) -> None:
    """The child's file goes into the store; only then a row names it. A full store costs no training."""
    store = unit.resources.artifacts
    path = checkpoints.checkpoint_path(unit.claim, said.epoch)
    try:
        stored = checkpoints.StoredCheckpoint(said.epoch, path, store.take_in(Path(said.path), path))
    except OSError as error:
        log.error("checkpoint_not_kept", epoch=said.epoch, error=type(error).__name__)
        return
    for old in unit.in_transaction(lambda session: checkpoints.save(session, unit.claim, stored)):
        store.remove_named(old)


def record_resume(unit: UnitLease, epoch: int) -> None:
    """Say that the training goes on. A retry is another job: it takes over the epochs of the one that it retries."""
    unit.report(event=("resumed", {"epoch": epoch}))

    def take_over(session: Session) -> None:
        retry_of = session.get_one(Job, unit.claim.job_id).retry_of
        if retry_of is not None and not queries.epochs(session, unit.claim.job_id):
            for data in queries.epochs(session, retry_of)[:epoch]:
                lifecycle.report(session, unit.claim, event=("epoch", data))

    unit.in_transaction(take_over)
