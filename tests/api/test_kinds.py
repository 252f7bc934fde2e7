"""`POST /jobs`: one address for all kinds of jobs, beside one for each."""

import uuid
from typing import Any

import pytest
from flask.testing import FlaskClient

from jobs.tables import ModelVersion
from tests.api.conftest import Finish, file, png
from tests.api.test_errors import assert_problem

TRAIN = {"source_url": "https://example.org/ct.zip", "params": {"epochs": 3}, "metadata": {"study": 7}}
OWN = ("id", "created_at", "links", "queue_position")
PATHS = {"train": "/jobs/train", "predict": "/jobs/predict", "predict_batch": "/jobs/predict/batch"}


def alike(job: dict) -> dict:
    """The job without what is its own."""
    return {name: value for name, value in job.items() if name not in OWN}


@pytest.fixture
def bodies(client: FlaskClient, champion: ModelVersion) -> dict[str, dict[str, Any]]:
    """A body of each kind."""
    scan = client.post("/scans", data={"file": file(png())}).get_json()["id"]
    return {
        "train": TRAIN,
        "predict": {"scan_id": scan, "custom_id": "a", "model": "1"},
        "predict_batch": {"scan_ids": [scan, scan], "custom_ids": ["a", "b"], "lane": "urgent"},
    }


@pytest.mark.parametrize("kind", PATHS)
def test_it_makes_the_same_job_as_the_address_of_its_kind(client: FlaskClient, bodies: dict, kind: str) -> None:
    one = client.post("/v1/jobs", json={"kind": kind, **bodies[kind]})
    other = client.post(f"/v1{PATHS[kind]}", json=bodies[kind])
    assert (one.status_code, one.headers["Location"]) == (202, f"/v1/jobs/{one.get_json()['id']}")
    assert alike(one.get_json()) == alike(other.get_json())


@pytest.mark.parametrize("kind", PATHS)
def test_it_refuses_the_same_fields_with_the_same_pointers(client: FlaskClient, bodies: dict, kind: str) -> None:
    wrong = {**bodies[kind], "metadata": {"a": []}, "lane": "slow", "colour": "red"}
    one = assert_problem(client.post("/jobs", json={"kind": kind, **wrong}), 422)
    other = assert_problem(client.post(PATHS[kind], json=wrong), 422)
    assert one["errors"] == other["errors"]


def test_multipart_has_a_kind_too(client: FlaskClient, champion: ModelVersion) -> None:
    one = client.post("/jobs", data={"kind": "predict", "file": file(png()), "explain": "true"}).get_json()
    many = {"kind": "predict_batch", "files": [file(png(), "a.png"), file(png(9), "b.png")], "custom_ids": ["a", "b"]}
    batch = client.post("/jobs", data=many).get_json()
    assert (one["kind"], one["params"], batch["kind"], batch["counts"]["total"]) == (
        "predict", {"explain": True}, "predict_batch", 2
    )  # fmt: skip


@pytest.mark.parametrize("body", [{}, {"kind": "ingest"}, {"kind": ["train"]}, {"kind": None}])
def test_without_a_known_kind_it_is_422_at_kind(client: FlaskClient, body: dict) -> None:
    for answer in (client.post("/jobs", json={**TRAIN, **body}), client.post("/jobs", data={"file": file(png())})):
        (error,) = assert_problem(answer, 422)["errors"]
        assert (error["pointer"], error["in"]) == ("/kind", "body")
        assert "predict_batch" in error["detail"]
    assert_problem(client.post("/jobs", json=[1]), 422)


def test_a_key_makes_one_job_and_who_prefers_to_wait_gets_it_done(
    client: FlaskClient, champion: ModelVersion, finish: Finish
) -> None:
    body = {"kind": "train", **TRAIN}
    first, again = (client.post("/jobs", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert (first.status_code, first.data) == (again.status_code, again.data)
    other = client.post("/jobs", json={**body, "name": "b"}, headers={"Idempotency-Key": "k"})
    assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")
    scan = {"kind": "predict", "scan_id": str(uuid.uuid4())}
    assert_problem(client.post("/jobs", json=scan), 404)
    waited = client.post("/jobs", json=body, headers={"Prefer": "wait=1"})
    assert (waited.status_code, waited.headers["Preference-Applied"]) == (202, "wait=1")
