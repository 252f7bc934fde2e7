"""Cases 13 and 14 of the acceptance, and the crash of case 1 once more, with a real network and real checkpoints."""

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from jobs.db import Sessions
from jobs.queue import checkpoints
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import queries
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Checkpoint, Json, ModelVersion, Scan, ScanResult
from ml.synthetic import phantom_files
from tests import builders
from tests.builders import TENANT
from tests.faults.sabotage import Sabotage
from tests.faults.work import events, tally, training, wrong
from tests.processes import Stack, eventually, stack

pytestmark = pytest.mark.faults

PARAMS = {"weights": "none", "epochs": 4, "augmentation": False, "learning_rate": 0.01, "image_size": [32, 32, 3]}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zip of synthetic CT, and the slices themselves."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom_files.write_zip(folder / "kidneys.zip", patients=12, slices=3, seed=7)
    phantom_files.write_dataset(folder / "new", patients=4, slices=3, seed=99)
    return folder


@pytest.fixture
def patient(fast: Settings, sessions: Sessions) -> Iterator[Stack]:
    """A stack, without processes yet, whose clocks a loaded machine still keeps."""
    with stack(fast.model_copy(update={"lease_seconds": 4, "give_up_seconds": 3}), sessions, "dispatcher") as empty:
        yield empty


@pytest.mark.full
def test_13_a_training_killed_while_it_writes_a_checkpoint(patient: Stack, plan: Sabotage, scans: Path) -> None:
    """kill -9 while a checkpoint is written → the one before loads, hash verified.

    Guard: a checkpoint is written beside its name and renamed when it is on the disk, and its row, with the hash, comes
    last. Without the hash a torn file would be loaded, and the training fail or go on from nonsense.
    """
    writing = plan.at("ml.runtime.tensorfile:sync", "pause", given="epoch-0004")
    patient.start("train", environ=plan.environ())
    job_id = train(patient, scans, epochs=6)
    eventually(lambda: writing.happened() and _kept(patient, job_id)[:1] == [3], 120, patient.logs)
    patient.kill("train")
    (newest, before) = rows(patient, job_id)
    _tear(BlobStore(patient.settings.artifacts), newest)
    patient.start("train", environ=plan.environ())

    job = patient.wait_for(job_id, 120)
    assert (job.state, job.attempt) == ("succeeded", 2), (job.error, patient.logs())
    assert [event.data["epoch"] for event in events(patient, job_id, "resumed")] == [before.epoch] == [2]
    assert [epoch["epoch"] for epoch in _epochs(patient, job_id)] == [1, 2, 3, 4, 5, 6]
    assert wrong(patient) == []


@pytest.mark.full
def test_14_a_training_resumes_after_the_epoch_that_it_had(patient: Stack, plan: Sabotage, scans: Path) -> None:
    """Training killed after epoch k resumes at k+1 and ends with the metrics of an undisturbed run (CPU, seeded).

    Guard: the checkpoint holds the whole state of the head and its optimizer, and all that is random is a function of
    seed and epoch. Without the momentum, or with a generator that goes on where the process left it, figures differ.
    """
    patient.start("train")
    undisturbed = patient.wait_for(train(patient, scans), 120)
    assert undisturbed.state == "succeeded", (undisturbed.error, patient.logs())
    patient.kill("train")

    after = plan.at("ml.image.learning.checkpoints:CheckpointWriter.__call__", "pause", nth=3)
    patient.start("train", environ=plan.environ())
    job_id = train(patient, scans)
    eventually(lambda: after.happened() and _kept(patient, job_id)[:1] == [2], 120, patient.logs)
    patient.kill("train")
    patient.start("train", environ=plan.environ())
    job = patient.wait_for(job_id, 120)
    assert (job.state, job.attempt) == ("succeeded", 2), (job.error, patient.logs())
    assert [event.data["epoch"] for event in events(patient, job_id, "resumed")] == [2]
    assert _figures(patient, job_id) == _figures(patient, undisturbed.id)
    assert job.metrics == undisturbed.metrics
    assert wrong(patient) == []


@pytest.mark.full
def test_01_again_with_the_real_network(patient: Stack, plan: Sabotage, scans: Path) -> None:
    """kill -9 the worker's tree in the middle of a batch → every scan has its result, the same as undisturbed."""
    patient.start("train")
    assert patient.wait_for(train(patient, scans, epochs=1), 120).state == "succeeded", patient.logs()
    patient.kill("train")
    patient.start("predict")
    calm = predict(patient, scans)
    assert patient.wait_for(calm, 90).state == "succeeded", patient.logs()
    patient.kill("predict")

    second_chunk = plan.at("jobs.queue.lifecycle:succeed", "pause", nth=2)
    patient.start("predict", environ=plan.environ())
    disturbed = predict(patient, scans)
    eventually(second_chunk.happened, 60, patient.logs)
    patient.kill("predict")
    assert 0 < tally(patient, disturbed)["succeeded"] < 12
    patient.start("predict", environ=plan.environ())
    assert patient.wait_for(disturbed, 90).state == "succeeded", patient.logs()
    assert _probabilities(patient, disturbed) == pytest.approx(_probabilities(patient, calm), abs=1e-5)
    assert wrong(patient) == []


def test_13_a_checkpoint_of_another_training(processes: Stack, plan: Sabotage) -> None:
    """A checkpoint that is whole, and is refused → the training begins anew and succeeds.

    Guard: BAD_CHECKPOINT discards the checkpoint instead of failing the job. Without it an upgrade that adds a
    parameter fails every training that is under way, though nothing is wrong with it.
    """
    plan.training(seconds=0.1, refuses=True)
    death = plan.at("worker.handlers.train:_finish", "kill")
    processes.start("dispatcher")
    processes.start("train", environ=plan.environ())
    job_id = training(processes, epochs=3)

    job = processes.wait_for(job_id)
    assert death.happened()
    assert job.state == "succeeded", (job.error, processes.logs())
    assert wrong(processes) == []


def train(processes: Stack, scans: Path, **params: object) -> uuid.UUID:
    """A training on the phantom."""
    blob = BlobStore(processes.settings.artifacts).put_file(scans / "kidneys.zip")
    with processes.sessions.begin() as session:
        dataset = builders.make_dataset(session)
        dataset.archive_sha256 = blob.sha256
        session.flush()
        new = NewJob(
            TENANT, JobKind.TRAIN, Lane.TRAIN, params={**PARAMS, **params}, dataset_id=dataset.id, promote="never"
        )
        return submit(session, new).id


def predict(processes: Stack, scans: Path) -> uuid.UUID:
    """A batch of twelve slices in chunks of four."""
    store = BlobStore(processes.settings.artifacts)
    with processes.sessions.begin() as session:
        model = session.scalars(select(ModelVersion)).first()
        assert model is not None
        results = []
        for path in sorted((scans / "new").rglob("*.png"))[:12]:
            blob = store.put_file(path)
            known = session.scalar(select(Scan).where(Scan.sha256 == blob.sha256))
            known = known or builders.make_scan(session, TENANT, blob.sha256)
            results.append(NewResult(known.id, name=path.name))
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=model.id, model_version=model.version)
        return submit(session, new, results, chunk=4).id


def rows(processes: Stack, job_id: uuid.UUID) -> list[Checkpoint]:
    """The job's checkpoints, the furthest first."""
    with processes.sessions() as session:
        return list(checkpoints.latest(session, job_id))


def _kept(processes: Stack, job_id: uuid.UUID) -> list[int]:
    return [row.epoch for row in rows(processes, job_id)]


def _tear(store: BlobStore, row: Checkpoint) -> None:
    """Change one byte in the middle of a stored checkpoint, which was whole until now."""
    path = Path(store.fetch_named(row.path, row.sha256, Path("/nowhere")) or "")
    content = bytearray(path.read_bytes())
    assert hashlib.sha256(content).hexdigest() == row.sha256
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _epochs(processes: Stack, job_id: uuid.UUID) -> list[Json]:
    with processes.sessions() as session:
        return queries.epochs(session, job_id)


def _figures(processes: Stack, job_id: uuid.UUID) -> list[Json]:
    timed = ("seconds", "attempt")
    return [{k: v for k, v in epoch.items() if k not in timed} for epoch in _epochs(processes, job_id)]


def _probabilities(processes: Stack, job_id: uuid.UUID) -> list[float]:
    with processes.sessions() as session:
        found = select(ScanResult).where(ScanResult.job_id == job_id).order_by(ScanResult.ordinal)
        return [(row.probabilities or {})["Tumor"] for row in session.scalars(found)]
