"""What a tenant, and all together, may have in the queue: refused early, exactly, and without a trace."""

import threading
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select, update
from werkzeug.test import TestResponse

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset, IdempotencyKey, Job, ModelVersion, Scan, TenantLoad
from tests import builders
from tests.api.conftest import Door, Finish, file, png, zipped
from tests.api.test_errors import assert_problem

TRAIN = {"source_url": "https://example.org/ct.zip"}
MINE = {"quota_scans": 5, "quota_batches": 2, "queue_ceiling": 100}


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """A small queue; a test may ask for another one by `limits`."""
    return settings.model_copy(update={**MINE, **getattr(request, "param", {})})


@pytest.fixture
def app(app: Flask, champion: ModelVersion) -> Flask:
    """The application with this queue, and a champion."""
    return app


def count(sessions: Sessions, table: type) -> int:
    with sessions.begin() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def load(sessions: Sessions, tenant: str = builders.TENANT) -> tuple[int, int]:
    with sessions.begin() as session:
        row = session.get_one(TenantLoad, tenant)
        return row.scans, row.batches


def batch(client: FlaskClient, number: int) -> TestResponse:
    files = [file(png(shade=shade), f"{shade}.png") for shade in range(number)]
    return client.post("/jobs/predict/batch", data={"files": files})


def refused(answer: TestResponse, code: str = "QUOTA_EXCEEDED") -> dict[str, Any]:
    problem = assert_problem(answer, 503 if code == "QUEUE_FULL" else 429, code)
    assert int(answer.headers["Retry-After"]) > 0
    return problem


def test_scans_up_to_the_quota_are_taken_and_no_more(client: FlaskClient, sessions: Sessions) -> None:
    assert batch(client, 5).status_code == 202
    assert "5 unfinished scans" in refused(client.post("/jobs/predict", data={"file": file(png())}))["detail"]
    refused(client.post("/jobs/train", json=TRAIN))
    assert load(sessions) == (5, 1)


def test_batches_up_to_the_quota_are_taken_and_no_more(client: FlaskClient, sessions: Sessions) -> None:
    for _ in range(2):
        assert batch(client, 1).status_code == 202
    assert "batches" in refused(batch(client, 1))["detail"]
    assert client.post("/jobs/predict", data={"file": file(png())}).status_code == 202
    assert load(sessions) == (3, 2)


@pytest.mark.parametrize("ending", ["done", "cancelled"])
def test_what_has_ended_makes_room(client: FlaskClient, sessions: Sessions, finish: Finish, ending: str) -> None:
    job = batch(client, 5).get_json()["id"]
    if ending == "done":
        finish(job)
    else:
        client.post(f"/jobs/{job}/cancel")
    assert load(sessions) == (0, 0)
    assert batch(client, 5).status_code == 202


def test_a_batch_of_broken_files_alone_holds_no_room(client: FlaskClient, sessions: Sessions) -> None:
    answer = client.post("/jobs/predict/batch", data={"files": [file(b"no image"), file(b"none either")]})
    assert answer.get_json()["terminal"]
    assert load(sessions) == (0, 0)


def test_what_is_refused_leaves_nothing_behind(client: FlaskClient, sessions: Sessions) -> None:
    jobs = count(sessions, Job)
    refused(batch(client, 6))
    members = {f"{shade}.png": png(shade=shade) for shade in range(6)}
    refused(client.post("/jobs/predict/batch", data={"files": [file(zipped(members), "six.zip")]}))
    assert count(sessions, Scan) == 0
    assert count(sessions, Job) == jobs
    assert batch(client, 5).status_code == 202
    refused(client.post("/jobs/predict", data={"file": file(png(shade=77))}))
    refused(client.post("/datasets", data={"file": file(zipped({"Normal/a.png": png()}), "k.zip")}))
    assert (count(sessions, Scan), count(sessions, Dataset)) == (5, 0)


def test_a_refusal_gives_the_idempotency_key_up(client: FlaskClient, finish: Finish) -> None:
    first = batch(client, 5).get_json()["id"]
    key = {"Idempotency-Key": "late"}
    refused(client.post("/jobs/train", json=TRAIN, headers=key))
    finish(first)
    assert client.post("/jobs/train", json=TRAIN, headers=key).status_code == 202


def test_an_answer_that_comes_again_needs_no_room(client: FlaskClient) -> None:
    key = {"Idempotency-Key": "early"}
    first = client.post("/jobs/train", json=TRAIN, headers=key)
    batch(client, 4)
    refused(client.post("/jobs/train", json=TRAIN))
    assert client.post("/jobs/train", json=TRAIN, headers=key).data == first.data


def test_a_job_that_was_made_before_its_request_died_needs_no_room(client: FlaskClient, sessions: Sessions) -> None:
    def send() -> TestResponse:
        return client.post("/jobs/predict", data={"file": file(png())}, headers={"Idempotency-Key": "died"})

    made = send().get_json()["id"]
    with sessions.begin() as session:
        session.execute(update(IdempotencyKey).values(status=None, locked_at=func.to_timestamp(0)))
    batch(client, 4)
    assert send().get_json()["id"] == made


def test_one_tenants_quota_is_not_anothers(client: FlaskClient, stranger: FlaskClient) -> None:
    batch(client, 5)
    refused(client.post("/jobs/train", json=TRAIN))
    assert stranger.post("/jobs/train", json=TRAIN).status_code == 202


@pytest.mark.parametrize("settings", [{"queue_ceiling": 4}], indirect=True)
def test_past_the_ceiling_of_all_it_is_503_for_all(client: FlaskClient, stranger: FlaskClient) -> None:
    batch(client, 4)
    refused(stranger.post("/jobs/train", json=TRAIN), "QUEUE_FULL")
    refused(client.post("/jobs/train", json=TRAIN), "QUEUE_FULL")
    assert stranger.get("/jobs").status_code == 200


def test_many_at_once_do_not_slip_past_the_quota(app: Flask, door: Door, sessions: Sessions) -> None:
    bearer = {"Authorization": door.client().environ_base["HTTP_AUTHORIZATION"]}
    answers: list[int] = []
    start = threading.Barrier(20)

    def send() -> None:
        start.wait()
        answers.append(app.test_client().post("/jobs/train", json=TRAIN, headers=bearer).status_code)

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [202] * 5 + [429] * 15
    assert load(sessions) == (5, 0)


def test_a_retry_needs_room_too(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        failed = builders.make_job(session, state=builders.JobState.FAILED).id
    batch(client, 5)
    refused(client.post(f"/jobs/{failed}/retry"))
