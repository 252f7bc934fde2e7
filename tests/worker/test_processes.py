"""Dispatcher and workers as real processes: what is submitted gets done, whoever dies meanwhile."""

import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from jobs.models import reproduction
from jobs.queue import lifecycle
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Dataset, Job, JobEvent, ModelVersion, PredictionCount, Scan, ScanResult
from ml.synthetic import phantom_files
from tests import builders
from tests.builders import TENANT, units_of
from tests.databases import Database, Databases
from tests.jobs.checker import faults
from tests.processes import Stack, count, eventually, small_settings, stack

pytestmark = pytest.mark.slow

PARAMS = {
    "network": "resnet18", "weights": "none", "epochs": 2, "augmentation": False, "learning_rate": 0.01,
    "image_size": [64, 64, 3],
}  # fmt: skip
LONG = 1000
"""Epochs of a training that does not end by itself while a test looks at it."""
CLOCKS = {"lease_seconds": 4, "give_up_seconds": 3, "cancel_grace_seconds": 1}
"""Clocks that a loaded test machine still keeps."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of synthetic CT: 12 patients, 3 slices each."""
    path = tmp_path_factory.mktemp("phantom") / "kidneys.zip"
    phantom_files.write_zip(path, patients=12, slices=3, seed=7)
    return path


@pytest.fixture(scope="module")
def shared(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, Stack]]:
    """The processes of all tests, with their database. None runs yet."""
    with databases.borrow() as database:
        settings = small_settings(tmp_path_factory.mktemp("processes"), database.url, redis_url)
        with stack(settings.model_copy(update=CLOCKS), database.sessions(20)) as empty:
            yield database, empty


@pytest.fixture
def processes(shared: tuple[Database, Stack]) -> Stack:
    """A dispatcher and two workers, with an empty database. What a test has killed is started for the next one."""
    database, started = shared
    database.clear()
    started.ensure("dispatcher", "predict", "train")
    return started


CONNECTIONS = """
SELECT application_name IN ('renalq-worker', 'renalq-beat', 'renalq-claim') AS workers, count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'renalq-%' AND application_name <> 'renalq-api'
GROUP BY workers
"""


@contextmanager
def most_connections(processes: Stack) -> Iterator[dict[bool, int]]:
    """The most connections that workers (True) and the dispatcher (False) have while the block runs."""
    found, ended = {True: 0, False: 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            with processes.sessions() as session:
                for workers, connections in session.execute(text(CONNECTIONS)):
                    found[workers] = max(found[workers], connections)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_a_dataset_is_checked_trained_on_used_and_trained_on_again(processes: Stack, archive: Path) -> None:
    with most_connections(processes) as connections:
        dataset = _checked(processes, archive)
        original = _trained(processes, dataset)
        _used(processes, archive.parent)
    assert connections[True] <= 2 * 3, "of two workers: one of the parent, two of the child"
    assert connections[False] <= 5, "of a leading dispatcher"
    _done_again(processes, original)
    _trained_on(processes, dataset)
    with processes.sessions() as session:
        assert faults(session) == []


def _checked(processes: Stack, archive: Path) -> uuid.UUID:
    dataset, ingest = upload(processes, archive)
    assert processes.wait_for(ingest).state == "succeeded", processes.logs()
    with processes.sessions() as session:
        checked = session.get_one(Dataset, dataset)
        assert (checked.state, checked.classes) == ("ready", {"Normal": 18, "Tumor": 18})
        assert checked.report is not None
        assert checked.report["inspection"]["patients"] == 12
        return checked.id


def _trained(processes: Stack, dataset: uuid.UUID) -> uuid.UUID:
    job = processes.wait_for(train(processes, dataset, seed=7), 120)
    assert job.state == "succeeded", (job.error, processes.logs())
    assert job.metrics is not None
    assert set(job.metrics) >= {"accuracy", "precision", "recall", "f1", "confusion_matrix"}
    assert [stage["state"] for stage in job.stages] == ["succeeded"] * 4
    with processes.sessions() as session:
        version = session.query(ModelVersion).one()
        assert (version.job_id, version.version, job.model_version) == (job.id, 1, 1)
        assert version.params["momentum"] == 0.9, "defaults are recorded too"
        assert {"device", "engine"} <= set(version.environment)
        epochs = session.query(JobEvent).filter_by(job_id=job.id, type="epoch").all()
        assert [event.data["epoch"] for event in epochs] == [1, 2]
    return job.id


def _used(processes: Stack, folder: Path) -> None:
    with processes.sessions() as session:
        version = session.query(ModelVersion).one()
    batch = processes.wait_for(predict(processes, version, folder), 60)
    assert (batch.state, batch.succeeded, batch.failed) == ("partially_succeeded", 4, 1), batch.error
    with processes.sessions() as session:
        results = session.query(ScanResult).order_by(ScanResult.ordinal).all()
        assert all(sum(r.probabilities.values()) == pytest.approx(1) for r in results[:4] if r.probabilities)
        assert results[4].error is not None
        assert None not in [r.disposition for r in results[:4]]
        counted = session.query(PredictionCount.what).distinct()
        assert {what for (what,) in counted} == {*version.reference["statistics"], "class", "disposition"}
        assert faults(session) == []


def _done_again(processes: Stack, original: uuid.UUID) -> None:
    with processes.sessions.begin() as session:
        again = reproduction.reproduce(session, TENANT, original).id
    job = processes.wait_for(again, 120)
    assert job.state == "succeeded", (job.error, processes.logs())
    assert job.reproduction is not None
    assert job.reproduction["differences"] == {}
    assert job.reproduction["environment_differences"] == {}
    assert (job.reproduction["matches"], job.reproduction["same_dataset"]) == (True, True)
    with processes.sessions() as session:
        artifacts = {row.name for row in session.query(Artifact).filter_by(job_id=job.id)}
        assert {"scores.json", "dataset_report.json", "report.html", "report.pdf", "manifest.json"} <= artifacts


def _trained_on(processes: Stack, dataset: uuid.UUID) -> None:
    onward = processes.wait_for(train(processes, dataset, seed=7, weights="version:1"), 120)
    assert onward.state == "succeeded", (onward.error, processes.logs())
    with processes.sessions() as session:
        first, _, last = session.query(ModelVersion).order_by(ModelVersion.version).all()
        assert last.environment["base_weights_sha256"] == first.weights_sha256


def test_a_training_whose_whole_worker_tree_is_killed_ends_well_at_attempt_2(processes: Stack, archive: Path) -> None:
    dataset = ready_dataset(processes, archive)
    job_id = train(processes, dataset, epochs=100)
    has_an_epoch(processes)
    children = psutil.Process(processes.running["train"].pid).children(recursive=True)
    processes.kill("train")
    assert not psutil.wait_procs(children, timeout=5)[1], "nobody trains on for a lease that is lost"
    processes.start("train")
    job = processes.wait_for(job_id, 120)
    assert (job.state, job.attempt) == ("succeeded", 2), (job.error, processes.logs())
    with processes.sessions() as session:
        assert faults(session) == []


def test_when_only_the_celery_parent_is_killed_its_children_die_with_it(processes: Stack, archive: Path) -> None:
    train(processes, ready_dataset(processes, archive), epochs=LONG)
    has_an_epoch(processes)
    parent = psutil.Process(processes.running["train"].pid)
    children = parent.children(recursive=True)
    assert len(children) >= 2, "the pool's child, and the training"
    parent.kill()
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_cancelled_training_stops_within_its_grace(processes: Stack, archive: Path) -> None:
    job_id = train(processes, ready_dataset(processes, archive), epochs=LONG)
    has_an_epoch(processes)
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, TENANT, job_id)
    asked = time.monotonic()
    assert processes.wait_for(job_id, 20).state == "cancelled"
    assert time.monotonic() - asked < processes.settings.beat_seconds + processes.settings.cancel_grace_seconds + 3
    tree = psutil.Process(processes.running["train"].pid).children(recursive=True)
    assert not [process for process in tree if "ml" in process.cmdline()], "the device is free"
    with processes.sessions() as session:
        assert faults(session) == []


def test_a_worker_told_to_stop_hands_its_unit_back_at_once(processes: Stack, archive: Path) -> None:
    job_id = train(processes, ready_dataset(processes, archive), epochs=LONG)
    has_an_epoch(processes)
    assert processes.stop("train") == 0
    with processes.sessions() as session:
        (unit,) = units_of(session, session.get_one(Job, job_id))
        assert unit.state in ("queued", "dispatched")
        assert unit.failures == 0, "a drain is not a failure"


def test_a_job_submitted_while_redis_is_away_runs_when_it_is_back(
    processes: Stack, archive: Path, redis_url: str
) -> None:
    redis = next(c for c in psutil.net_connections("tcp") if c.laddr and f":{c.laddr.port}/" in redis_url and c.pid)
    server = psutil.Process(redis.pid)
    processes.alive()
    server.send_signal(signal.SIGSTOP)
    try:
        _, job_id = upload(processes, archive)
        time.sleep(2)
        assert processes.job(job_id).state == "queued"
    finally:
        server.send_signal(signal.SIGCONT)
    assert processes.wait_for(job_id, 60).state == "succeeded", processes.logs()


def test_bad_params_and_broken_weights_end_the_job_with_a_code(processes: Stack, archive: Path) -> None:
    dataset = ready_dataset(processes, archive)
    processes.stop("train")  # a worker that lives says that it has none, and the job would be refused
    wanted = train(processes, dataset, weights="imagenet")
    processes.ensure("train")
    job = processes.wait_for(wanted, 90)
    assert job.error is not None
    assert job.error["code"] == "WEIGHTS_MISSING", processes.logs()
    assert job.attempt == 1, "trying again would not help"
    assert [stage["state"] for stage in job.stages] == ["succeeded", "failed", "queued", "queued"]


# --- what the tests submit ---


def ready_dataset(processes: Stack, archive: Path) -> uuid.UUID:
    """A dataset that needs no check."""
    blob = BlobStore(processes.settings.artifacts).put_file(archive)
    with processes.sessions.begin() as session:
        dataset = builders.make_dataset(session)
        dataset.archive_sha256 = blob.sha256
        return dataset.id


def has_an_epoch(processes: Stack) -> None:
    """Wait until the training has told of an epoch."""
    told = "SELECT count(*) FROM job_events WHERE type = 'epoch'"
    eventually(lambda: count(processes.sessions, told), 90, processes.logs)


def upload(processes: Stack, archive: Path) -> tuple:  # type: ignore[type-arg]
    """A dataset with its ingest job."""
    blob = BlobStore(processes.settings.artifacts).put_file(archive)
    with processes.sessions.begin() as session:
        dataset = Dataset(tenant_id=TENANT, name="kidneys", archive_sha256=blob.sha256, archive_bytes=blob.size)
        session.add(dataset)
        session.flush()
        job = submit(session, NewJob(TENANT, JobKind.INGEST, Lane.BATCH, dataset_id=dataset.id))
        dataset.job_id = job.id
        return dataset.id, job.id


def train(processes: Stack, dataset: object, **params: object):  # type: ignore[no-untyped-def]
    """A training's job id."""
    new = NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params={**PARAMS, **params}, dataset_id=dataset)  # type: ignore[arg-type]
    with processes.sessions.begin() as session:
        return submit(session, new).id


def predict(processes: Stack, version: ModelVersion, folder: Path):  # type: ignore[no-untyped-def]
    """A batch of four slices and a text file in two chunks."""
    phantom_files.write_dataset(folder / "new", patients=2, slices=2, seed=99)
    files = sorted((folder / "new").rglob("*.png"))
    (folder / "new" / "broken.png").write_bytes(b"this is no image")
    store = BlobStore(processes.settings.artifacts)
    with processes.sessions.begin() as session:
        scans = []
        for path in [*files[:4], folder / "new" / "broken.png"]:
            blob = store.put_file(path)
            scan = Scan(
                tenant_id=TENANT, sha256=blob.sha256, size=blob.size, media_type="image/png", width=512, height=512
            )
            session.add(scan)
            session.flush()
            scans.append(NewResult(scan.id, name=path.name))
        shutil.rmtree(folder / "new")
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=version.id, model_version=version.version)
        return submit(session, new, scans, chunk=3).id
