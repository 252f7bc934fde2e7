"""What Celery says of a unit's task, and Flower shows: how the unit ended, with ids and codes alone.

Real workers; the test listens to Celery's events as Flower does.
"""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.events import EventReceiver
from celery.events.state import State

from jobs.queue import lifecycle
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Scan
from ml.synthetic import phantom_files
from tests import builders
from tests.builders import TENANT
from tests.databases import Databases
from tests.jobs.checker import faults
from tests.processes import Stack, count, eventually, small_settings, stack
from tests.worker.test_processes import CLOCKS, LONG, train, upload

pytestmark = pytest.mark.slow
NAME = "DOE^JANE.png"
READY = {"SUCCESS", "FAILURE", "REVOKED", "RETRY"}
EPOCHS = "SELECT count(*) FROM job_events WHERE type = 'epoch'"


@contextmanager
def watching(settings: Settings) -> Iterator[State]:
    """Celery's events, collected as Flower collects them."""
    app, state = Celery(broker=settings.redis_url), State()
    with app.connection() as connection:
        receiver = EventReceiver(connection, handlers={"*": state.event}, app=app)
        listening = threading.Thread(target=receiver.capture, kwargs={"limit": None, "timeout": None}, daemon=True)
        listening.start()
        yield state
        receiver.should_stop = True
        listening.join(5)


@pytest.fixture(scope="module")
def watched(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, State]]:
    """Dispatcher, two workers, and what Celery says of them."""
    with databases.borrow() as database:
        settings = small_settings(tmp_path_factory.mktemp("celery"), database.url, redis_url)
        settings = settings.model_copy(update=CLOCKS)
        with (
            watching(settings) as state,
            stack(settings, database.sessions(20), "dispatcher", "predict", "train") as all_,
        ):
            all_.alive(2)
            yield all_, state


def tasks(watched: tuple[Stack, State], job_id: uuid.UUID, number: int = 1) -> list[Any]:
    """The first tasks of a job, once so many have ended, oldest first. On a slow machine messages are sent twice: those
    that found nothing to do are left out."""

    def ended() -> list[Any] | None:
        mine = [task for _, task in watched[1].tasks_by_time() if str(job_id) in str(task.kwargs)]
        found = [task for task in mine if task.state in READY and "NOT_CLAIMED" not in shown(task)]
        return found if len(found) >= number else None

    return sorted(eventually(ended, 90, watched[0].logs), key=lambda task: task.received)[:number]


def shown(task: Any) -> str:
    """All that Flower shows of it."""
    told = task.name, task.args, task.kwargs, task.result, task.exception, task.traceback
    return " ".join(map(str, (*told, getattr(task, "signum", ""))))


def scan(processes: Stack, content: bytes = b"no image") -> NewResult:
    blob = BlobStore(processes.settings.artifacts).put(BytesIO(content))
    with processes.sessions.begin() as session:
        row = Scan(tenant_id=TENANT, sha256=blob.sha256, size=8, media_type="image/png", width=8, height=8)
        session.add(row)
        session.flush()
        return NewResult(row.id, name=NAME, custom_id="order-7")


def predict(processes: Stack, weights: str) -> uuid.UUID:
    with processes.sessions.begin() as session:
        model = builders.make_model(session, weights_sha256=weights)
    with processes.sessions.begin() as session:
        new = NewJob(TENANT, JobKind.PREDICT, Lane.URGENT, model_id=model.id, model_version=model.version)
        return submit(session, new, [scan(processes)]).id


def test_a_failed_unit_is_a_failure_with_its_code_and_its_jobs_id(watched: tuple[Stack, State]) -> None:
    job_id = predict(watched[0], "f" * 64)
    (task,) = tasks(watched, job_id)
    assert (task.state, task.name) == ("FAILURE", "renalq.predict")
    assert "MODEL_MISSING" in task.exception
    assert str(job_id) in task.exception
    assert watched[0].wait_for(job_id).state == "failed"
    assert not [word for word in ("DOE", "order-7") if word in shown(task)]


def test_a_training_that_fails_is_a_failure_too(watched: tuple[Stack, State]) -> None:
    processes = watched[0]
    with processes.sessions.begin() as session:
        new = NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params={"weights": "none"})  # its dataset was deleted
        job_id = submit(session, new).id
    (task,) = tasks(watched, job_id)
    assert (task.state, task.name, "BAD_DATASET" in task.exception) == ("FAILURE", "renalq.train", True)


def test_what_succeeds_says_what_it_was_and_what_is_requeued_is_a_retry(
    watched: tuple[Stack, State], tmp_path: Path
) -> None:
    """An ingest that succeeds, one whose dataset is bad, and a training from an address where nobody is: it is tried
    again, by a message of the dispatcher."""
    processes = watched[0]
    phantom_files.write_zip(tmp_path / "kidneys.zip", patients=12, slices=3, seed=7)
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    good, bad = (upload(processes, tmp_path / name)[1] for name in ("kidneys.zip", "bad.zip"))
    with processes.sessions.begin() as session:
        new = NewJob(
            TENANT, JobKind.TRAIN, Lane.TRAIN, params={"weights": "none"}, source_url="http://127.0.0.1:9/scans.zip"
        )
        unreachable = submit(session, new).id
    (done,), (refused,) = tasks(watched, good), tasks(watched, bad)
    assert (done.state, done.name, done.result) == ("SUCCESS", "renalq.check_dataset", "'units: 1'")
    assert (refused.state, "BAD_DATASET" in refused.exception) == ("FAILURE", True)
    (tried,) = tasks(watched, unreachable)
    assert (tried.state, "DOWNLOAD_FAILED" in tried.exception) == ("RETRY", True)
    eventually(lambda: processes.job(unreachable).attempt > 1, 60, processes.logs)
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, TENANT, unreachable)
    assert processes.wait_for(unreachable).state == "cancelled"
    with processes.sessions() as session:
        assert faults(session) == []


def test_what_is_cancelled_is_revoked(watched: tuple[Stack, State], tmp_path: Path) -> None:
    """While it runs; and while its message waits behind it, whose claim is then refused."""
    processes = watched[0]
    phantom_files.write_zip(tmp_path / "kidneys.zip", patients=12, slices=3, seed=8)
    dataset, ingest = upload(processes, tmp_path / "kidneys.zip")
    processes.wait_for(ingest)
    job_id = train(processes, dataset, epochs=LONG)
    eventually(lambda: count(processes.sessions, EPOCHS), 60, processes.logs)
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, TENANT, job_id)
    (task,) = tasks(watched, job_id)
    assert task.state == "REVOKED"
    assert processes.wait_for(job_id).state == "cancelled"
    with processes.sessions() as session:
        assert faults(session) == []
