"""POST /jobs/ID/retry: a new job for what came to no good end, made once."""

import threading
import uuid

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select

from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.states import JobKind, JobState
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.api.conftest import Door, Finish, file, png
from tests.api.test_errors import assert_problem


def ended(sessions: Sessions, state: JobState, **given: object) -> str:
    with sessions.begin() as session:
        return str(builders.make_job(session, state=state, **given).id)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_a_retry_is_a_new_job_that_names_the_old_one(client: FlaskClient, sessions: Sessions, state: JobState) -> None:
    told = {"params": {"epochs": 3}, "metadata": {"study": 7}, "name": "first try"}
    old = ended(sessions, state, **told, warnings=[builders.BROKEN])
    answer = client.post(client.get(f"/jobs/{old}").get_json()["links"]["retry"])
    new = answer.get_json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/jobs/{new['id']}" != f"/jobs/{old}"
    assert int(answer.headers["Retry-After"]) > 0
    assert (new["retry_of"], new["state"], new["kind"]) == (old, "queued", "train")
    assert (new["params"], new["metadata"], new["name"]) == ({"epochs": 3}, {"study": 7}, "first try")
    assert new["warnings"] == [], "those of the first try are its own"
    before = client.get(f"/jobs/{old}").get_json()
    assert (before["state"], before["retry_of"]) == (state, None)


def test_repeated_it_is_the_same_new_job(client: FlaskClient, sessions: Sessions, finish: Finish) -> None:
    old = ended(sessions, JobState.FAILED)
    new = client.post(f"/jobs/{old}/retry").get_json()["id"]
    again = client.post(f"/jobs/{old}/retry")
    assert (again.status_code, again.get_json()["id"]) == (202, new)
    finish(new)
    ended_since = client.post(f"/jobs/{old}/retry")
    assert (ended_since.status_code, ended_since.get_json()["state"]) == (202, "succeeded")


def test_a_retry_can_be_retried(client: FlaskClient, sessions: Sessions) -> None:
    old = ended(sessions, JobState.FAILED)
    second = client.post(f"/jobs/{old}/retry").get_json()["id"]
    client.post(f"/jobs/{second}/cancel")
    third = client.post(f"/jobs/{second}/retry").get_json()
    assert third["retry_of"] == second


def test_many_at_once_make_one_new_job(app: Flask, door: Door, sessions: Sessions) -> None:
    old = ended(sessions, JobState.FAILED)
    bearer = {"Authorization": door.client().environ_base["HTTP_AUTHORIZATION"]}
    made: list[str] = []
    start = threading.Barrier(10)

    def send() -> None:
        start.wait()
        made.append(app.test_client().post(f"/jobs/{old}/retry", headers=bearer).get_json()["id"])

    threads = [threading.Thread(target=send) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(set(made))) == (10, 1)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).where(Job.retry_of == uuid.UUID(old))) == 1


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED])
def test_from_another_state_it_is_409_and_says_from_which_it_goes(
    client: FlaskClient, sessions: Sessions, state: JobState
) -> None:
    detail = assert_problem(client.post(f"/jobs/{ended(sessions, state)}/retry"), 409, "WRONG_STATE")["detail"]
    for word in (state, "failed", "partially_succeeded", "cancelled"):
        assert word in detail


def test_anothers_job_is_404_as_an_unknown_one(stranger: FlaskClient, sessions: Sessions) -> None:
    old = ended(sessions, JobState.FAILED)
    assert_problem(stranger.post(f"/jobs/{old}/retry"), 404)
    assert_problem(stranger.post(f"/jobs/{builders.unknown_id()}/retry"), 404)
    assert_problem(stranger.post("/jobs/not-an-id/retry"), 404)


def test_a_retry_needs_the_scope_to_write(door: Door, sessions: Sessions) -> None:
    assert_problem(door.client("jobs:read").post(f"/jobs/{ended(sessions, JobState.FAILED)}/retry"), 403)


def test_of_a_batch_only_what_has_no_result_is_done_anew(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    files = [file(png(shade=shade), f"{shade}.png") for shade in range(4)] + [file(b"no image", "note.txt")]
    old = client.post("/jobs/predict/batch", data={"files": files}).get_json()
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, session.get_one(Job, uuid.UUID(old["id"])))[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=2))
    new = client.post(f"/jobs/{old['id']}/retry").get_json()
    assert new["counts"] == {"total": 2, "succeeded": 0, "failed": 0, "cancelled": 0, "pending": 2}
    assert new["model_version"] == str(champion.version)
    pending = client.get(f"/jobs/{new['id']}/results?state=pending").get_json()["data"]
    assert [row["name"] for row in pending] == ["0.png", "1.png"]


def test_a_batch_of_which_nothing_is_stored_cannot_be_retried(client: FlaskClient, champion: ModelVersion) -> None:
    old = client.post("/jobs/predict/batch", data={"files": [file(b"no image")]}).get_json()
    assert old["state"] == "failed"
    assert "upload" in assert_problem(client.post(f"/jobs/{old['id']}/retry"), 409, "WRONG_STATE")["detail"]


def test_an_idempotency_key_does_no_harm(client: FlaskClient, sessions: Sessions) -> None:
    old, key = ended(sessions, JobState.FAILED), {"Idempotency-Key": "again"}
    first = client.post(f"/jobs/{old}/retry", headers=key)
    again = client.post(f"/jobs/{old}/retry", headers=key)
    assert (again.data, again.headers["Idempotency-Replayed"]) == (first.data, "true")
    assert client.post(f"/jobs/{old}/retry").get_json()["id"] == first.get_json()["id"]
    other = ended(sessions, JobState.FAILED)
    assert_problem(client.post(f"/jobs/{other}/retry", headers=key), 422, "IDEMPOTENCY_KEY_REUSED")


PREDICTED = {"results", "studies", "summary"}


@pytest.mark.parametrize(
    ("kind", "special"),
    [(JobKind.TRAIN, {"metrics"}), (JobKind.PREDICT_BATCH, PREDICTED), (JobKind.INGEST, set())],
)
def test_a_job_links_to_what_its_kind_has(
    client: FlaskClient, sessions: Sessions, kind: JobKind, special: set[str]
) -> None:
    scans = 1 if kind == JobKind.PREDICT_BATCH else 0
    job = client.get(f"/jobs/{ended(sessions, JobState.QUEUED, kind=kind, scans=scans)}").get_json()
    assert set(job["links"]) == {"self", "events", "artifacts", "cancel", "retry"} | special
