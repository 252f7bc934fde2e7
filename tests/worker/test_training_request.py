"""What a training's child is told, from the job's rows."""

import io
import json
import threading
import uuid
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.db import Sessions
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.settings import Settings
from jobs.tables import Dataset, Job, ModelVersion
from ml.pipelines import TrainingJob
from tests import builders
from tests.worker.conftest import Hold
from worker.execution.resources import Resources
from worker.execution.unit import UnitLease, WorkFailed
from worker.handlers import training_request
from worker.handlers.train import RunState, run_training


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With a folder of weights, and a small cache."""
    folder = tmp_path / "weights"
    folder.mkdir()
    return settings.model_copy(update={"weights_dir": folder, "feature_cache_bytes": 1000})


def told(unit: UnitLease, folder: Path) -> TrainingJob:
    """What the child reads from its file."""
    folder.mkdir(exist_ok=True)
    request = unit.in_transaction(lambda session: training_request.read(session, unit))
    return TrainingJob.of(json.loads(training_request.write(unit, request, folder, None).read_text()))


def refused(unit: UnitLease, folder: Path) -> dict[str, Any]:
    """The error of an order that cannot be carried out."""
    with pytest.raises(WorkFailed) as raised:
        told(unit, folder)
    return raised.value.error


def test_the_child_gets_all_parameters_the_cache_and_the_revision(
    hold: Hold, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_request, "code_revision", lambda: "abc123")
    job = told(hold(epochs=3), tmp_path / "own")
    assert (job.pipeline, job.base_model, job.champion, job.resume) == ("image", None, None, None)
    assert (job.cache, job.cache_bytes) == (settings.home.resolve() / "cache", 1000)
    assert job.revision == "abc123"
    assert job.titles["Dataset"].startswith("kidneys (")
    assert "task default" in job.titles["Job"]
    assert (job.params["epochs"], job.params["test_size"], job.params["network"]) == (3, 0.2, "vgg16")
    assert job.archive is not None
    assert job.archive.read_bytes() == b"a zip"


def test_without_room_for_it_there_is_no_cache(hold: Hold, tmp_path: Path, resources: Resources) -> None:
    resources.settings.feature_cache_bytes = 0
    assert told(hold(), tmp_path / "own").cache is None


def test_a_job_of_an_earlier_version_is_read_with_its_old_parameter_names(hold: Hold, tmp_path: Path) -> None:
    params = told(hold(held_out=0.3), tmp_path / "own").params
    assert params["test_size"] == 0.3
    assert "held_out" not in params


def test_parameters_that_this_code_does_not_know_fail_the_job_by_name(hold: Hold, tmp_path: Path) -> None:
    error = refused(hold(colour="red"), tmp_path / "own")
    assert (error["code"], error["retryable"]) == ("BAD_PARAMS", False)
    assert "colour" in error["detail"]


# --- a dataset that is fetched ---


def addressed(sessions: Sessions, resources: Resources, url: str) -> UnitLease:
    """A held training on what lies at this address."""
    with sessions.begin() as session:
        job = builders.make_job(session, source_url=url)
        return UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)


def test_a_dataset_at_an_address_is_fetched_for_the_child(
    sessions: Sessions, resources: Resources, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "ct.zip").write_bytes(b"a zip")
    serve = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as site:
        threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
        resources.settings.fetch_hosts = host = f"127.0.0.1:{site.server_port}"
        unit = addressed(sessions, resources, f"http://{host}/ct.zip")
        request = unit.in_transaction(lambda session: training_request.read(session, unit))
        fetched = training_request.with_source(unit, request, tmp_path)
        site.shutdown()
    (tmp_path / "own").mkdir()
    file = training_request.write(unit, fetched, tmp_path / "own", None)
    assert TrainingJob.of(json.loads(file.read_text())).archive.read_bytes() == b"a zip"
    assert host not in file.read_text()
    state = RunState.of(fetched.spec, done=fetched.downloaded)
    assert state.progress("data_ingestion", 0) == fetched.spec.progress("data_ingestion", 0.4)


@pytest.mark.parametrize("hosts", ["", "scans.example"])
def test_an_address_that_is_not_allowed_any_more_fails_the_job_at_once(
    sessions: Sessions, resources: Resources, hosts: str
) -> None:
    resources.settings.fetch_hosts = hosts
    unit = addressed(sessions, resources, "http://127.0.0.1:1/Canary.zip")
    with pytest.raises(WorkFailed) as raised:
        run_training(unit)
    error = raised.value.error
    assert (error["code"], error["retryable"]) == ("DOWNLOAD_FAILED", False)
    assert "RENALQ_FETCH_HOSTS" in error["detail"]
    assert "Canary" not in error["detail"]


# --- weights to begin from ---


def test_a_file_is_taken_from_the_folder_of_weights(hold: Hold, tmp_path: Path, settings: Settings) -> None:
    assert settings.weights_dir is not None
    (settings.weights_dir / "mine.pth").write_bytes(b"w")
    assert told(hold(weights="file:mine.pth"), tmp_path / "own").base_model == settings.weights_dir / "mine.pth"


def test_a_missing_weights_file_says_where_to_put_it(hold: Hold, tmp_path: Path, settings: Settings) -> None:
    error = refused(hold(weights="file:mine.pth"), tmp_path / "own")
    assert (error["code"], error["retryable"]) == ("WEIGHTS_MISSING", False)
    assert "mine.pth" in error["detail"]
    assert "RENALQ_WEIGHTS_DIR" in error["detail"]
    assert str(settings.weights_dir) not in error["detail"], "a client has no business with the workers' folders"


def test_without_the_setting_the_folder_lies_in_the_home(hold: Hold, tmp_path: Path, resources: Resources) -> None:
    resources.settings.weights_dir = None
    folder = resources.settings.home / "weights"
    assert "RENALQ_HOME/weights" in refused(hold(weights="file:mine.pth"), tmp_path / "own")["detail"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.pth").write_bytes(b"w")
    assert told(hold(weights="file:mine.pth"), tmp_path / "other").base_model == folder.resolve() / "mine.pth"


@pytest.mark.parametrize("name", ["../secret.pth", "/etc/hostname", "..", "weights/../../secret.pth"])
def test_a_weights_name_with_a_path_is_refused(hold: Hold, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.pth").write_bytes(b"w")
    assert refused(hold(weights=f"file:{name}"), tmp_path / "own")["code"] == "WEIGHTS_MISSING"


def made(hold: Hold, sessions: Sessions, weights_sha256: str, f1: float = 0.0) -> uuid.UUID:
    """A version with these weights; it is champion with an F1 that is good enough."""
    unit = hold()
    with sessions.begin() as session:
        new = NewModel(weights_sha256, ["A", "B"], {}, {**builders.SCORES, "f1": f1}, None, None)
        version = promotion.register(session, unit.claim, new, GatePolicy())
        lifecycle.succeed(session, unit.claim)
        return version.id


def test_a_version_is_the_one_that_the_job_was_pinned_to(
    hold: Hold, tmp_path: Path, sessions: Sessions, resources: Resources
) -> None:
    blob = resources.artifacts.put(io.BytesIO(b"weights"))
    version = made(hold, sessions, blob.sha256)
    for unit in (hold(version, weights="version:1"), hold(weights="version:1")):
        path = told(unit, tmp_path / str(unit.claim.unit_id)).base_model
        assert path is not None
        assert path.read_bytes() == b"weights"


def test_a_version_without_its_weights_fails_the_job(hold: Hold, tmp_path: Path, sessions: Sessions) -> None:
    version = made(hold, sessions, "f" * 64)
    assert refused(hold(version, weights="version:1"), tmp_path / "own")["code"] == "MODEL_MISSING"


def test_a_version_that_is_gone_fails_the_job(hold: Hold, tmp_path: Path) -> None:
    assert refused(hold(uuid.uuid4(), weights="version:1"), tmp_path / "own")["code"] == "WEIGHTS_MISSING"
    assert refused(hold(weights="version:9"), tmp_path / "own")["code"] == "WEIGHTS_MISSING"


# --- the champion that it is compared with ---


def test_the_champion_of_the_trainings_start_is_named(
    hold: Hold, tmp_path: Path, sessions: Sessions, resources: Resources
) -> None:
    blob = resources.artifacts.put(io.BytesIO(b"champion"))
    version = made(hold, sessions, blob.sha256, f1=0.9)
    unit = hold()
    champion = told(unit, tmp_path / "own").champion
    assert champion is not None
    assert champion.read_bytes() == b"champion"
    order = unit.in_transaction(lambda session: training_request.read(session, unit))
    assert order.champion == training_request.Champion(version, blob.sha256)


def test_the_child_scores_the_champion_at_the_operating_point_of_now(
    hold: Hold, tmp_path: Path, sessions: Sessions, resources: Resources
) -> None:
    version = made(hold, sessions, resources.artifacts.put(io.BytesIO(b"champion")).sha256, f1=0.9)
    assert told(hold(), tmp_path / "before").champion_threshold is None
    with sessions.begin() as session:
        found = session.get_one(ModelVersion, version)
        found.metrics = {**found.metrics, "threshold": 0.2, "pooling": {"threshold": 0.3}}
    now = told(hold(), tmp_path / "after")
    assert (now.champion_threshold, now.champion_pooling) == (0.2, {"threshold": 0.3})


def test_a_champion_whose_weights_are_gone_does_not_fail_the_training(
    hold: Hold, tmp_path: Path, sessions: Sessions
) -> None:
    made(hold, sessions, "f" * 64, f1=0.9)
    assert told(hold(), tmp_path / "own").champion is None


def test_the_child_gets_the_locked_test_set_as_a_second_zip(
    hold: Hold, tmp_path: Path, sessions: Sessions, resources: Resources
) -> None:
    unit = hold()
    blob = resources.artifacts.put(io.BytesIO(b"another zip"))
    with sessions.begin() as session:
        dataset = builders.make_dataset(session)
        dataset.archive_sha256 = blob.sha256
        session.get_one(Job, unit.claim.job_id).test_dataset_id = dataset.id
    test = told(unit, tmp_path / "own").test_archive
    assert test is not None
    assert test.read_bytes() == b"another zip"
    with sessions.begin() as session:
        session.delete(session.get_one(Dataset, dataset.id))
    assert "to test on was deleted" in refused(unit, tmp_path / "gone")["detail"]
