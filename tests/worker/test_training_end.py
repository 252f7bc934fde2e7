"""A training's end in a real worker, with a child that only says what a training says (see tests/faults/sabotage)."""

import uuid
from collections.abc import Iterator
from io import BytesIO

import pytest
from sqlalchemy import select

from jobs.errors import WeightsMissing
from jobs.models import promotion, reproduction
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.queue import processes as queue_processes
from jobs.results import queries
from jobs.states import Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import JobEvent, ModelEvaluation, ModelVersion
from ml.spec.registry import spec_of
from tests import builders
from tests.builders import TENANT
from tests.databases import Database, Databases
from tests.faults.sabotage import Sabotage
from tests.faults.work import training
from tests.processes import Stack, eventually, small_settings, stack
from worker.tracking.provenance import environment


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Sabotage:
    """Trainings learn nothing and soon end."""
    made = Sabotage(tmp_path_factory.mktemp("training-end"))
    made.training(seconds=0.3)
    return made


@pytest.fixture(scope="module")
def shared(
    databases: Databases, redis_url: str, plan: Sabotage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, Stack]]:
    """A dispatcher, and a worker whose trainings learn nothing and soon end; with their database."""
    folder = tmp_path_factory.mktemp("home")
    with databases.borrow() as database:
        settings = small_settings(folder, database.url, redis_url)
        with stack(settings, database.sessions(20), "dispatcher") as started:
            started.start("train", environ=plan.environ())
            yield database, started


@pytest.fixture
def processes(shared: tuple[Database, Stack]) -> Stack:
    """The dispatcher and the worker, with an empty database."""
    database, started = shared
    database.clear()
    return started


def test_a_training_is_reproduced_and_compared_with_what_it_was(processes: Stack) -> None:
    original = processes.wait_for(training(processes, epochs=2, seed=7))
    assert original.state == "succeeded", (original.error, processes.logs())
    with processes.sessions.begin() as session:
        again = reproduction.reproduce(session, TENANT, original.id).id
    job = processes.wait_for(again)
    assert job.state == "succeeded", (job.error, processes.logs())
    assert job.reproduction is not None
    assert (job.reproduction["of"], job.reproduction["matches"]) == (str(original.id), True)
    assert job.reproduction["same_environment"]
    assert job.reproduction["same_dataset"]
    with processes.sessions() as session:
        first, second = session.scalars(select(ModelVersion).order_by(ModelVersion.version)).all()
        assert second.params == first.params, "complete, with every default"
        assert (second.params["seed"], second.champion) == (7, False)
        assert second.environment == environment(spec_of("image").packages)
        types = session.scalars(select(JobEvent.type).where(JobEvent.job_id == again).order_by(JobEvent.id)).all()
        assert types[-2:] == ["reproduced", "succeeded"]


def _reported(processes: Stack, name: str) -> bool:
    """Whether the live worker says that it can read these weights; None where it has said nothing yet."""
    with processes.sessions() as session:
        return name in (queue_processes.readable_weights(session, Lane.TRAIN, "image") or ())


def test_weights_that_no_live_worker_has_are_refused_at_submit(processes: Stack) -> None:
    folder = processes.settings.weights
    folder.mkdir(exist_ok=True)
    (folder / "yours.pth").write_bytes(b"w")
    eventually(lambda: _reported(processes, "file:yours.pth"), 30, processes.logs)
    with pytest.raises(WeightsMissing, match=r"no live worker can read file:mine\.pth.*RENALQ_WEIGHTS_DIR") as raised:
        training(processes, weights="file:mine.pth")
    assert "yours.pth" not in str(raised.value)
    accepted = training(processes, weights="file:yours.pth")
    assert processes.wait_for(accepted).state == "succeeded", processes.logs()


def test_weights_that_the_worker_has_not_end_the_job_with_the_remedy(processes: Stack, plan: Sabotage) -> None:
    processes.stop("train")  # nobody says what workers can read
    job_id: uuid.UUID = training(processes, weights="file:mine.pth")
    processes.start("train", environ=plan.environ())
    job = processes.wait_for(job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("WEIGHTS_MISSING", 1)
    assert "mine.pth" in job.error["detail"]


# --- beside the champion ---


def champion_with(processes: Stack, word: bytes) -> int:
    """A champion, whose first word tells the stub how good it is."""
    blob = BlobStore(processes.settings.artifacts).put(BytesIO(word + b" weights"))
    with processes.sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel(blob.sha256, ["Normal", "Tumor"], {}, {**builders.SCORES, "test_digest": "1" * 64}, None, None)
        version = promotion.register(session, held, new, GatePolicy())
        lifecycle.succeed(session, held)
        assert version.champion
        return version.version


@pytest.mark.parametrize(
    ("word", "promoted", "reason"),
    [
        (b"worse", True, "F1 0.8000, the champion's 0.7500 (version 1) on the same 40 test scans in 40 "),
        (b"better", False, "F1 0.8000, the champion's 0.8500 (version 1) on the same 40 test scans in 40 "),
        (b"torn", False, "It cannot be compared with the champion (version 1): its file cannot be read. "),
    ],
)
def test_the_gate_uses_the_childs_scores_of_the_champion(
    processes: Stack, word: bytes, promoted: bool, reason: str
) -> None:
    champion_with(processes, word)
    job = processes.wait_for(training(processes, epochs=1))
    assert job.state == "succeeded", (job.error, processes.logs())
    with processes.sessions() as session:
        version = session.scalars(select(ModelVersion).where(ModelVersion.job_id == job.id)).one()
        assert version.champion == promoted
        assert version.gate["reasons"][2].startswith(reason)
        assert version.reference is not None
        assert version.reference["scans"] == 93
        kept = session.scalars(select(ModelEvaluation).where(ModelEvaluation.test_digest == "f" * 64)).all()
        assert len(kept) == (0 if word == b"torn" else 2)
        assert "champion" not in version.metrics, "a reproduction has another champion beside it, and is the same"


def test_a_champion_that_changed_during_the_training_is_not_compared_with(
    processes: Stack,
) -> None:
    champion_with(processes, b"worse")
    job_id = training(processes, epochs=6)
    eventually(lambda: _epochs(processes, job_id))
    with processes.sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel("c" * 64, ["Normal", "Tumor"], {}, builders.SCORES, None, None)
        second = promotion.register(session, held, new, GatePolicy())
        lifecycle.succeed(session, held)
        promotion.promote(session, TENANT, str(second.version), GatePolicy(), force=True, reason="It is needed now.")
    assert processes.wait_for(job_id).state == "succeeded"
    with processes.sessions() as session:
        late = session.scalars(select(ModelVersion).where(ModelVersion.job_id == job_id)).one()
        assert not late.champion
        assert "(version 2): the champion changed while it trained" in late.gate["reasons"][2]


def _epochs(processes: Stack, job_id: uuid.UUID) -> int:
    """How many epochs it has told of."""
    with processes.sessions() as session:
        return len(queries.epochs(session, job_id))
