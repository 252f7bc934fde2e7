"""POST /jobs/ID/reproduce: a succeeded training is done again, and says at its end whether the figures match."""

import uuid
from typing import Any

import pytest
from flask.testing import FlaskClient

from jobs.db import Sessions
from jobs.models import promotion, reproduction
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.states import JobKind, JobState
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.api.conftest import Door
from tests.api.test_errors import assert_problem

COMPLETE = {"epochs": 3, "seed": 7, "weights": "none", "learning_rate": 0.01}


def finish_training(sessions: Sessions, job_id: str, f1: float = 0.97, params: dict[str, Any] = COMPLETE) -> None:
    """What the worker does at a training's end."""
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, session.get_one(Job, uuid.UUID(job_id)))[0])
        new = NewModel("a" * 64, ["Normal", "Tumor"], params, {"f1": f1}, "d" * 64, "abc")
        promotion.register(session, held, new, GatePolicy())
        reproduction.save_comparison(session, held)
        lifecycle.succeed(session, held, metrics={"f1": f1})


@pytest.fixture
def original(client: FlaskClient, sessions: Sessions) -> dict[str, Any]:
    """A training on a dataset, ended well."""
    with sessions.begin() as session:
        dataset = builders.make_dataset(session).id
    body = {"dataset_id": str(dataset), "params": {"epochs": 3, "seed": 7}, "name": "first", "metadata": {"study": 7}}
    job = client.post("/jobs/train", json=body).get_json()
    finish_training(sessions, job["id"])
    return dict(client.get(f"/jobs/{job['id']}").get_json())


def test_it_is_a_new_training_with_everything_as_it_was(
    client: FlaskClient, sessions: Sessions, original: dict[str, Any]
) -> None:
    answer = client.post(original["links"]["reproduce"])
    new = answer.get_json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/jobs/{new['id']}" != f"/jobs/{original['id']}"
    assert (new["kind"], new["state"], new["reproduction_of"]) == ("train", "queued", original["id"])
    assert new["params"] == COMPLETE, "with the defaults of that day, whatever they are now"
    assert (new["dataset_id"], new["name"], new["metadata"]) == (original["dataset_id"], "first", {"study": 7})
    assert new["reproduction"] is None
    assert "reproduce" not in new["links"], "it has not ended yet"


def test_at_its_end_it_says_whether_the_figures_match(
    client: FlaskClient, sessions: Sessions, original: dict[str, Any]
) -> None:
    new = client.post(f"/jobs/{original['id']}/reproduce").get_json()["id"]
    finish_training(sessions, new, f1=0.9)
    job = client.get(f"/jobs/{new}").get_json()
    assert job["reproduction"] == {
        "of": original["id"],
        "revision": {"original": "abc", "now": "abc", "same": True},
        "same_environment": True,
        "environment_differences": {},
        "same_dataset": True,
        "matches": False,
        "tolerance": 1e-6,
        "differences": {"f1": [0.97, 0.9]},
    }
    events = client.get(f"/jobs/{new}/events").get_json()["data"]
    assert [event["data"] for event in events if event["type"] == "reproduced"] == [job["reproduction"]]
    version = client.get(f"/models/{job['model_version']}").get_json()
    assert not version["champion"]
    assert "promote: never" in version["gate"]["reasons"][0]


def test_each_time_it_is_another_job_but_not_for_the_same_key(client: FlaskClient, original: dict[str, Any]) -> None:
    address, key = f"/jobs/{original['id']}/reproduce", {"Idempotency-Key": "once"}
    first, again = client.post(address, headers=key), client.post(address, headers=key)
    assert (again.data, again.headers["Idempotency-Replayed"]) == (first.data, "true")
    assert client.post(address).get_json()["id"] != first.get_json()["id"]


def test_a_reproduction_can_be_reproduced(client: FlaskClient, sessions: Sessions, original: dict[str, Any]) -> None:
    second = client.post(f"/jobs/{original['id']}/reproduce").get_json()["id"]
    finish_training(sessions, second)
    third = client.post(f"/jobs/{second}/reproduce").get_json()
    assert third["reproduction_of"] == second


def test_of_an_older_training_the_parameters_are_renamed(client: FlaskClient, sessions: Sessions) -> None:
    job = client.post("/jobs/train", json={"source_url": "https://example.org/ct.zip"}).get_json()["id"]
    finish_training(sessions, job, params={"epochs": 2, "held_out": 0.3})
    assert client.post(f"/jobs/{job}/reproduce").get_json()["params"] == {"epochs": 2, "test_size": 0.3}


def test_without_its_dataset_it_is_409(client: FlaskClient, original: dict[str, Any]) -> None:
    assert client.delete(f"/datasets/{original['dataset_id']}").status_code == 202
    problem = assert_problem(client.post(f"/jobs/{original['id']}/reproduce"), 409, "DATASET_GONE")
    assert "deleted" in problem["detail"]


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED])
def test_only_what_has_succeeded_can_be_done_again(client: FlaskClient, sessions: Sessions, state: JobState) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=state)
    problem = assert_problem(client.post(f"/jobs/{job.id}/reproduce"), 409, "WRONG_STATE")
    assert state in problem["detail"]
    assert "succeeded" in problem["detail"]
    assert "reproduce" not in client.get(f"/jobs/{job.id}").get_json()["links"]


def test_only_a_training_can_be_reproduced(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.INGEST, JobState.SUCCEEDED)
    problem = assert_problem(client.post(f"/jobs/{job.id}/reproduce"), 409, "WRONG_STATE")
    assert "ingest" in problem["detail"]
    assert "reproduce" not in client.get(f"/jobs/{job.id}").get_json()["links"]


def test_anothers_training_is_404_and_a_reader_may_not(
    door: Door, stranger: FlaskClient, original: dict[str, Any]
) -> None:
    assert_problem(stranger.post(f"/jobs/{original['id']}/reproduce"), 404)
    assert_problem(stranger.post(f"/jobs/{builders.unknown_id()}/reproduce"), 404)
    assert_problem(door.client("jobs:read").post(f"/jobs/{original['id']}/reproduce"), 403)


def test_it_counts_against_the_quota(
    client: FlaskClient, app: Any, original: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.extensions["renalq"].settings, "quota_scans", 1)
    address = f"/jobs/{original['id']}/reproduce"
    assert client.post(address).status_code == 202
    assert_problem(client.post(address), 429, "QUOTA_EXCEEDED")


def test_a_training_from_a_version_is_reproduced_from_that_version(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    weights = f"version:{champion.version}"
    body = {"source_url": "https://example.org/ct.zip", "params": {"weights": weights}}
    job = client.post("/jobs/train", json=body).get_json()["id"]
    finish_training(sessions, job, params={"weights": weights})
    again = client.post(f"/jobs/{job}/reproduce").get_json()["id"]
    with sessions.begin() as session:
        assert session.get_one(Job, uuid.UUID(again)).base_model_id == champion.id
