"""The endpoints of the older documents, as their clients know them."""

import base64
import io
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select
from werkzeug.test import TestResponse

from api.http import waiting
from api.http.context import EXTENSION
from jobs.db import Sessions
from jobs.queue import explanations
from jobs.queue.leases import Claim
from jobs.queue.outcomes import ScanOutcome
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.api.conftest import Door, Finish, file, png
from tests.api.test_errors import assert_problem
from tests.applications import application
from tests.processes import eventually
from tests.stand_in import tumors, worker

MIB = 2**20
UNREADABLE = {"code": "BAD_IMAGE", "detail": "The picture is cut off.", "retryable": False}


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def body_of(path: str, image: bytes) -> dict:
    return {"images": [b64(image)]} if path == "/batch_predict" else {"image": b64(image)}


# --- predict ---


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_predict_waits_and_answers_class_and_confidence(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, prefix: str
) -> None:
    with worker(sessions):
        answer = client.post("/predict", json={"image": prefix + b64(png())})
    assert (answer.status_code, answer.get_json()) == (200, [{"image": "Tumor", "confidence": 0.9456}])
    (job,) = client.get("/jobs?kind=predict").get_json()["data"]
    assert job["state"] == "succeeded"


def test_predict_takes_a_file_and_the_urgent_lane(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with worker(sessions):
        answer = client.post("/predict", data={"file": file(png(), "DOE.png")})
    assert answer.get_json() == [{"image": "Tumor", "confidence": 0.9456}]
    with sessions() as session:
        assert session.scalars(select(Job.lane).where(Job.kind == "predict")).all() == ["urgent"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [({"image": b64(b"no image")}, "PNG"), ({"image": "%%%"}, "base64"), ({"image": ""}, "PNG"), ({}, "Missing")],
    ids=["text", "no base64", "empty", "missing"],
)
def test_what_is_no_image_is_422_and_pointed_at(client: FlaskClient, body: dict, detail: str) -> None:
    (error,) = assert_problem(client.post("/predict", json=body), 422)["errors"]
    assert error["pointer"] == "/image"
    assert detail in error["detail"]


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_without_a_model_it_is_404_and_says_train_first(client: FlaskClient, path: str) -> None:
    answer = client.post(path, json={"image": b64(png())})
    assert "Train one first: POST /train" in assert_problem(answer, 404)["detail"]


def test_what_only_the_worker_finds_broken_is_422_too(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with worker(sessions, lambda ordinals: [ScanOutcome(o, error=UNREADABLE) for o in ordinals]):
        answer = client.post("/predict", json={"image": b64(png())})
    assert assert_problem(answer, 422)["errors"] == [
        {"pointer": "/image", "detail": "The picture is cut off.", "in": "body"}
    ]


def test_what_the_worker_could_not_do_is_500_with_its_reason_and_the_job(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with worker(sessions, lambda ordinals: [ScanOutcome(o, error=builders.BROKEN) for o in ordinals]):
        answer = client.post("/predict", json={"image": b64(png())})
    assert assert_problem(answer, 500, builders.BROKEN["code"])["detail"] == builders.BROKEN["detail"]
    assert client.get(answer.headers["Location"]).get_json()["state"] == "failed"


def test_what_takes_too_long_is_503_with_the_jobs_address(
    client: FlaskClient, champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_WAIT", 0.1)
    answer = client.post("/predict", json={"image": b64(png())})
    assert_problem(answer, 503, "NOT_DONE_YET")
    assert int(answer.headers["Retry-After"]) > 0
    assert client.get(answer.headers["Location"]).get_json()["state"] == "queued"


def test_what_was_cancelled_meanwhile_is_409(
    client: FlaskClient, champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MAX_WAIT", 0.1)
    key = {"Idempotency-Key": "c-1"}
    late = client.post("/predict", json={"image": b64(png())}, headers=key)
    client.post(f"{late.headers['Location']}/cancel")
    assert (
        "cancelled" in assert_problem(client.post("/predict", json={"image": b64(png())}, headers=key), 409)["detail"]
    )


@pytest.mark.parametrize("path", ["/predict", "/explain", "/batch_predict"])
def test_with_no_slot_free_nobody_waits_and_the_job_goes_on(
    app: Flask, client: FlaskClient, champion: ModelVersion, finish: Finish, path: str
) -> None:
    app.extensions[EXTENSION].listener._slots = 0
    key, began = {"Idempotency-Key": "n-1"}, time.monotonic()
    answer = client.post(path, json=body_of(path, png()), headers=key)
    assert time.monotonic() - began < 5
    assert_problem(answer, 503, "NOT_DONE_YET")
    assert int(answer.headers["Retry-After"]) > 0
    job = client.get(answer.headers["Location"]).get_json()
    assert job["state"] == "queued"
    finish(job["id"])
    again = client.post(path, json=body_of(path, png()), headers=key)
    assert again.status_code == (500 if path == "/explain" else 200), "the job was done, if without an overlay"


@pytest.mark.parametrize("path", ["/predict", "/explain", "/batch_predict", "/jobs/predict"])
def test_who_waits_holds_no_image(
    app: Flask, client: FlaskClient, sessions: Sessions, champion: ModelVersion, path: str
) -> None:
    """Else two hundred of them, each with its 32 MiB, take all memory that there is."""
    image = png() + bytes(8 * MIB)  # behind its end a PNG may hold more
    sent, held = json.dumps(body_of(path, image)).encode(), []

    def look(_: Claim) -> None:
        eventually(lambda: app.extensions[EXTENSION].listener.waiting, 20)
        held.append(tracemalloc.get_traced_memory()[0])

    client.post(path, json=body_of(path, b"no scan"))  # imports what the first request imports
    tracemalloc.start()
    try:
        with worker(sessions, before=look):
            client.post(path, data=sent, content_type="application/json", headers={"Prefer": "wait=30"})
    finally:
        tracemalloc.stop()
    assert held[0] < 4 * MIB


@pytest.mark.parametrize(
    ("disposition", "told"),
    [("rejected", "rejected"), ("größer, rot", "gr%C3%B6%C3%9Fer%2C rot"), (None, "unknown")],
    ids=["rejected", "other letters", "none"],
)
def test_a_header_says_what_may_be_done_with_it(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, disposition: str | None, told: str
) -> None:
    with worker(sessions, lambda ordinals: [replace(one, disposition=disposition) for one in tumors(ordinals)]):
        answer = client.post("/predict", json={"image": b64(png())})
    assert answer.get_json() == [{"image": "Tumor", "confidence": 0.9456}]
    assert answer.headers["Renalq-Disposition"] == told


def test_the_same_key_makes_one_job_and_the_same_answer(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    key = {"Idempotency-Key": "k-1"}
    with worker(sessions):
        first = client.post("/predict", json={"image": b64(png())}, headers=key)
    again = client.post("/predict", json={"image": b64(png())}, headers=key)
    assert (again.data, again.headers["Idempotency-Replayed"]) == (first.data, "true")


# --- many ---


def test_batch_predict_answers_in_order_from_one_job(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    def last_is_rejected(ordinals: list[int]) -> list[ScanOutcome]:
        words = ["tumor", "tumor", "rejected"]
        return [replace(one, disposition=word) for one, word in zip(tumors(ordinals), words, strict=True)]

    with worker(sessions, last_is_rejected):
        answer = client.post("/batch_predict", json={"images": [b64(png(shade=shade)) for shade in (0, 90, 180)]})
    assert [one["confidence"] for one in answer.get_json()] == [0.9456, 0.8456, 0.7456]
    assert answer.headers["Renalq-Disposition"] == "tumor, tumor, rejected"
    (job,) = client.get("/jobs?kind=predict_batch").get_json()["data"]
    assert job["counts"]["succeeded"] == 3


def test_a_broken_image_of_many_is_pointed_at_and_nothing_is_submitted(
    client: FlaskClient, champion: ModelVersion
) -> None:
    images = [b64(png()), b64(png(9)), b64(png(10)), b64(b"broken"), b64(png(11)), b64(b"")]
    problem = assert_problem(client.post("/batch_predict", json={"images": images}), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["/images/3", "/images/5"]
    assert client.get("/jobs?kind=predict_batch").get_json()["data"] == []


def test_of_many_the_one_that_only_the_worker_finds_broken_is_pointed_at(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    def second_is_broken(ordinals: list[int]) -> list[ScanOutcome]:
        return [ScanOutcome(1, error=UNREADABLE) if one.ordinal == 1 else one for one in tumors(ordinals)]

    with worker(sessions, second_is_broken):
        answer = client.post("/batch_predict", json={"images": [b64(png(8)), b64(png(9))]})
    assert assert_problem(answer, 422)["errors"] == [
        {"pointer": "/images/1", "detail": "The picture is cut off.", "in": "body"}
    ]


@pytest.mark.parametrize("number", [0, 101])
def test_at_most_a_hundred_images_are_taken(client: FlaskClient, number: int) -> None:
    problem = assert_problem(client.post("/batch_predict", json={"images": [b64(png())] * number}), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["/images"]


# --- explain ---


@pytest.fixture
def overlay(sessions: Sessions, settings: Settings) -> Callable[[Claim], None]:
    """Keeps an overlay as the explaining worker does."""

    def keep(held: Claim) -> None:
        blob = BlobStore(settings.artifacts).put(io.BytesIO(png(16)))
        with sessions.begin() as session:
            explanations.save(session, held, [(explanations.artifact_name(0), blob)])

    return keep


@pytest.mark.parametrize("multipart", [False, True])
def test_explain_answers_the_overlay(
    client: FlaskClient,
    sessions: Sessions,
    champion: ModelVersion,
    overlay: Callable[[Claim], None],
    multipart: bool,
) -> None:
    body: dict = {"data": {"file": file(png())}} if multipart else {"json": {"image": b64(png())}}
    with worker(sessions, before=overlay):
        answer = client.post("/explain", **body, headers={"Idempotency-Key": "e-1"})
    assert (answer.status_code, answer.mimetype, answer.data) == (200, "image/png", png(16))
    body = {"data": {"file": file(png())}} if multipart else body
    again = client.post("/explain", **body, headers={"Idempotency-Key": "e-1"})
    assert (again.status_code, again.data) == (200, png(16)), "the job that bears the key has made it"
    assert len(client.get("/jobs?kind=predict").get_json()["data"]) == 1


def test_an_overlay_that_could_not_be_made_is_said_so(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with worker(sessions):
        answer = client.post("/explain", json={"image": b64(png())})
    assert_problem(answer, 500, "NOT_EXPLAINED")


# --- train ---


def ready(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return str(builders.make_dataset(session).id)


def test_train_without_a_body_takes_the_newest_ready_dataset_and_defaults(
    client: FlaskClient, sessions: Sessions
) -> None:
    ready(sessions)
    newest = ready(sessions)
    with sessions.begin() as session:
        builders.make_dataset(session, state="checking")
        builders.make_dataset(session, tenant_id="elsewhere")
    answer = client.post("/train")
    assert answer.status_code == 202
    job = answer.get_json()
    assert (job["kind"], job["dataset_id"], job["params"]) == ("train", newest, {})
    assert answer.headers["Location"] == f"/jobs/{job['id']}"


def test_train_takes_the_body_of_a_training(client: FlaskClient, sessions: Sessions) -> None:
    older = ready(sessions)
    ready(sessions)
    assert client.post("/train", json={"dataset_id": older}).get_json()["dataset_id"] == older
    assert client.post("/train", json={"params": {"epochs": 3}}).get_json()["params"] == {"epochs": 3}
    both = {"dataset_id": older, "source_url": "https://example.org/a.zip"}
    assert_problem(client.post("/train", json=both), 422)


def test_train_without_a_ready_dataset_is_409_and_says_to_upload_one(client: FlaskClient) -> None:
    assert "POST /datasets" in assert_problem(client.post("/train"), 409, "NO_DATASET")["detail"]


# --- status ---


def test_model_status_says_ready_or_not_found_exactly(
    client: FlaskClient, stranger: FlaskClient, champion: ModelVersion
) -> None:
    answer = client.get("/model-status")
    assert (answer.status_code, answer.get_json()) == (
        200,
        {"status": "ready", "model_path": "/models/1/weights", "model_version": "1"},
    )
    answer = stranger.get("/model-status")
    assert (answer.status_code, answer.get_json()) == (
        404,
        {"status": "not_found", "message": "Model needs to be trained"},
    )


def test_health_is_public_and_names_the_champion_to_its_own_key_alone(
    app: Flask, client: FlaskClient, stranger: FlaskClient, door: Door, champion: ModelVersion
) -> None:
    told = app.test_client().get("/health").get_json()
    assert (told["status"], told["model"]) == ("degraded", None)
    assert any("worker" in reason for reason in told["reasons"])
    assert client.get("/health").get_json()["model"]["version"] == "1"
    assert client.get("/health").get_json()["model"]["f1"] == 0.97
    assert stranger.get("/health").get_json()["model"] is None
    assert door.client("jobs:write").get("/health").get_json()["model"] is None
    assert_problem(app.test_client().get("/health", headers={"Authorization": "Bearer rq_wrong"}), 401)


def test_health_without_postgres_is_degraded_with_a_key_too(tmp_path: Path) -> None:
    away = Settings(home=tmp_path, database_url="postgresql+psycopg2://nobody@127.0.0.1:1/none")
    with application(away) as app:
        for headers in ({}, {"Authorization": "Bearer rq_x"}):
            answer = app.test_client().get("/health", headers=headers)
            assert (answer.status_code, answer.get_json()["status"]) == (200, "degraded")
            assert answer.get_json()["reasons"] == ["database: Postgres does not answer."]


# --- keys in addresses ---


@pytest.mark.parametrize("pattern", [":{key}", "{key}:", "anybody:{key}"], ids=["password", "user", "both"])
def test_a_key_may_come_by_basic_authentication(app: Flask, client: FlaskClient, pattern: str) -> None:
    made = client.post("/keys", json={"name": "older", "scopes": ["jobs:read"]}).get_json()
    answer = _basic(app, pattern.format(key=made["secret"]), "/jobs")
    assert answer.status_code == 200
    assert_problem(_basic(app, pattern.format(key=made["secret"]), "/keys"), 403)


@pytest.mark.parametrize("pair", [":", "", "rq_wrong:", "a:b", "\udcff"])
def test_a_wrong_pair_is_401_and_browsers_are_not_asked_for_one(app: Flask, pair: str) -> None:
    answer = _basic(app, pair, "/jobs")
    assert_problem(answer, 401)
    assert answer.headers.getlist("WWW-Authenticate") == ['Bearer realm="renalq"']


def _basic(app: Flask, pair: str, path: str) -> TestResponse:
    token = base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode()
    return app.test_client().get(path, headers={"Authorization": f"Basic {token}"})


def test_every_name_stands_in_the_openapi_document(client: FlaskClient) -> None:
    paths = client.get("/openapi.json").get_json()["paths"]
    assert {"/train", "/predict", "/batch_predict", "/explain", "/model-status", "/health", "/"} <= set(paths)
    assert paths["/train"]["post"]["requestBody"]["required"] is False
    assert "image/png" in paths["/explain"]["post"]["responses"]["200"]["content"]


def test_who_stands_in_for_the_worker_hides_no_failure(sessions: Sessions) -> None:
    with sessions.begin() as session:
        builders.make_job(session)

    def fall(_: Claim) -> None:
        raise RuntimeError("The stand-in fell.")

    with pytest.raises(RuntimeError, match="fell"), worker(sessions, before=fall):
        pass
