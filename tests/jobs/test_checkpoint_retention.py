"""Checkpoints are kept while their training runs, or a retry can resume from them."""

import uuid
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.queue import leases, lifecycle, submission
from jobs.retention import checkpoints
from jobs.settings import Settings
from jobs.states import JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Checkpoint, Job
from tests import builders

SOON = 1e-9
"""Retention time (days) that every ended job has passed."""
Where = tuple[Sessions, BlobStore, Settings]


@pytest.fixture
def where(sessions: Sessions, settings: Settings) -> Where:
    return sessions, BlobStore(settings.artifacts), settings


def trained(session: Session, settings: Settings, state: JobState) -> Job:
    """A training with a checkpoint."""
    job = builders.make_job(session, state=state)
    write_folder(settings, job.id)
    file = {"sha256": "a" * 64, "size": 1, "path": f"checkpoints/{job.id}/1-1.safetensors"}
    session.add(Checkpoint(job_id=job.id, tenant_id=job.tenant_id, fence=1, epoch=1, **file))
    return job


def write_folder(settings: Settings, job_id: uuid.UUID) -> None:
    folder = Path(settings.artifacts) / "checkpoints" / str(job_id)
    folder.mkdir(parents=True)
    (folder / "1-1.safetensors").write_bytes(b"weights")


def step(where: Where, days: float = SOON) -> bool:
    sessions, store, settings = where
    return checkpoints.step(sessions, store, settings.model_copy(update={"checkpoint_days": days}))


def kept(where: Where) -> set[uuid.UUID]:
    """Jobs with checkpoints: as rows and as files."""
    sessions, store, _ = where
    with sessions() as session:
        rows = set(session.scalars(select(Checkpoint.job_id)))
    files = {uuid.UUID(name) for name in store.entries("checkpoints")}
    assert files == rows
    return files


@pytest.mark.parametrize(
    ("state", "days", "stays"),
    [
        (JobState.RUNNING, SOON, True),
        (JobState.FAILED, 7, True),
        (JobState.CANCELLED, 7, True),
        (JobState.FAILED, 0, True),
        (JobState.FAILED, SOON, False),
        (JobState.CANCELLED, SOON, False),
        (JobState.SUCCEEDED, 7, False),
    ],
)
def test_checkpoints_stay_as_long_as_a_retry_could_use_them(
    where: Where, state: JobState, days: float, stays: bool
) -> None:
    with where[0].begin() as session:
        job_id = trained(session, where[2], state).id
    step(where, days)
    assert kept(where) == ({job_id} if stays else set())


def test_checkpoints_stay_while_a_retry_runs(where: Where) -> None:
    sessions, _, settings = where
    with sessions.begin() as session:
        old = trained(session, settings, JobState.FAILED).id
        again = submission.retry(session, builders.TENANT, old).id
    step(where)
    assert kept(where) == {old}
    with sessions.begin() as session:
        unit = builders.units_of(session, session.get_one(Job, again))[0]
        lifecycle.succeed(session, builders.claim(session, unit))
    step(where, days=7)
    assert kept(where) == set()


def test_checkpoints_stay_if_a_retry_is_being_submitted(where: Where) -> None:
    sessions, _, settings = where
    with sessions.begin() as session:
        old = trained(session, settings, JobState.FAILED).id
    with sessions.begin() as session:
        leases.lock_job(session, old)
        step(where)
        assert kept(where) == {old}
    step(where)
    assert kept(where) == set()


def test_folders_of_deleted_jobs_go_some_in_each_step(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FOLDERS", 2)
    for _ in range(3):
        write_folder(where[2], uuid.uuid4())
    assert step(where) is True
    assert step(where) is False
    assert kept(where) == set()


def test_store_is_asked_outside_transactions(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store over the network may take longer than Postgres lets a transaction idle."""
    pool, asked = where[0].kw["bind"].pool, list[int]()
    for name in ("entries", "remove_folder"):
        real = getattr(BlobStore, name)
        monkeypatch.setattr(BlobStore, name, lambda *of, real=real: asked.append(pool.checkedout()) or real(*of))
    write_folder(where[2], uuid.uuid4())
    step(where)
    assert asked == [0, 0]
