"""What is certain to fail is refused when it is submitted, with the field or the cause, and makes no job."""

import base64
from typing import Any

import pytest
from flask.testing import FlaskClient

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.tables import Dataset, ModelVersion
from ml.spec import registry
from tests import builders
from tests.api.conftest import png
from tests.api.test_errors import assert_problem

THIN = {"groups": {"Normal": 40, "Tumor": 4}, "sides": {"train": 10}}


def checked(sessions: Sessions, inspection: dict[str, Any], **classes: int) -> str:
    """A dataset whose check has found this."""
    with sessions.begin() as session:
        made = session.get_one(Dataset, builders.make_dataset(session).id)
        made.classes, made.report = classes, {"inspection": inspection, "warnings": []}
        return str(made.id)


def no_jobs(client: FlaskClient, kind: str) -> bool:
    return client.get(f"/jobs?kind={kind}&state=queued").get_json()["data"] == []


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({"classes": 3}, "/params/classes"),
        ({"folds": 5}, "/params/folds"),
        ({"split": "folders"}, "/params/split"),
    ],
)
def test_parameters_that_a_dataset_is_too_thin_for(
    client: FlaskClient, sessions: Sessions, params: dict[str, Any], pointer: str
) -> None:
    body = {"dataset_id": checked(sessions, THIN, Normal=80, Tumor=9)}
    problem = assert_problem(client.post("/jobs/train", json={**body, "params": params}), 422)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert no_jobs(client, "train")
    assert client.post("/jobs/train", json=body).status_code == 202, "without them it is enough"


def test_classes_with_too_few_patients_for_the_sides_of_a_split(client: FlaskClient, sessions: Sessions) -> None:
    body = {"dataset_id": checked(sessions, {"groups": {"Normal": 40, "Tumor": 2}}, Normal=80, Tumor=9)}
    problem = assert_problem(client.post("/jobs/train", json=body), 422)
    assert problem["errors"][0]["pointer"] == "/params/test_size"
    assert "Class Tumor has 2" in problem["errors"][0]["detail"]


def test_a_locked_test_set_of_other_classes(client: FlaskClient, sessions: Sessions) -> None:
    learnt, tested = checked(sessions, {}, Normal=80, Tumor=9), checked(sessions, {}, Normal=80, Cyst=9)
    problem = assert_problem(client.post("/jobs/train", json={"dataset_id": learnt, "test_dataset_id": tested}), 422)
    assert problem["errors"][0]["pointer"] == "/test_dataset_id"


def test_what_is_too_thin_is_the_pipelines_to_say(
    client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, heard = registry.spec_of("image"), []

    def shortages(params: Any, dataset: Any) -> list[tuple[str, str]]:
        heard.append((params.epochs, dict(dataset.classes), dataset.inspection))
        return [("epochs", "Too many for it.")]

    monkeypatch.setattr(
        "api.resources.jobs.train.spec_of", lambda body: spec.model_copy(update={"shortages": shortages})
    )
    body = {"dataset_id": checked(sessions, {"rows": 7}, Normal=8), "params": {"epochs": 9}}
    assert_problem(client.post("/jobs/train", json=body), 422)
    assert heard == [(9, {"Normal": 8}, {"rows": 7})]


@pytest.fixture
def gone(champion: ModelVersion, settings: Settings, client: FlaskClient) -> ModelVersion:
    """A champion whose file is not there any more."""
    builders.store_weights(settings).unlink()
    return champion


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("predict", {"image": base64.b64encode(png()).decode()}),
        ("predict", {"image": base64.b64encode(png()).decode(), "model": "1"}),
        ("train", {"source_url": "https://example.org/ct.zip", "params": {"weights": "version:1"}}),
    ],
)
def test_a_version_whose_file_is_gone(client: FlaskClient, gone: ModelVersion, path: str, body: dict[str, Any]) -> None:
    detail = assert_problem(client.post(f"/jobs/{path}", json=body), 409, "MODEL_MISSING")["detail"]
    assert "file of version 1" in detail
    assert no_jobs(client, path)


def test_a_batch_and_a_retry_too(client: FlaskClient, sessions: Sessions, gone: ModelVersion) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.FAILED, scans=2, model_id=gone.id)
        scan = builders.make_scan(session)
    batch = client.post("/jobs/predict/batch", json={"scan_ids": [str(scan.id)]})
    assert_problem(batch, 409, "MODEL_MISSING")
    assert_problem(client.post(f"/jobs/{job.id}/retry"), 409, "MODEL_MISSING")
    assert no_jobs(client, "predict_batch")


def test_a_file_that_is_set_aside_for_deletion_still_serves(
    client: FlaskClient, champion: ModelVersion, settings: Settings
) -> None:
    client.application.extensions["renalq"].blobs.set_aside(builders.WEIGHTS)
    body = {"image": base64.b64encode(png()).decode()}
    assert client.post("/jobs/predict", json=body).status_code == 202
