"""Webhooks as their owner sees them."""

import base64
import uuid

import pytest
from flask.testing import FlaskClient

from jobs.db import Sessions
from jobs.events import deliveries, webhooks
from jobs.events.deliveries import Attempt
from jobs.events.webhooks import EventType, Receiver
from tests import builders
from tests.api.conftest import Door, file, png
from tests.api.test_errors import assert_problem

URL = "https://ris.example/hook?token=7"


def emit(sessions: Sessions, *event_ids: str) -> None:
    with sessions.begin() as session:
        for event_id in event_ids:
            webhooks.emit(session, builders.TENANT, event_id, EventType.JOB_SUCCEEDED, {"state": "succeeded"})


def fail_one(sessions: Sessions) -> None:
    with sessions.begin() as session:
        due = deliveries.claim(session, 60, [], [])
        assert due is not None
        deliveries.record_attempt(session, due, Attempt(500, "The receiver answered 500."), ())


def test_a_webhook_hears_of_everything_unless_it_names_events_and_shows_its_secret_once(client: FlaskClient) -> None:
    made = client.post("/webhooks", json={"url": URL})
    assert made.status_code == 201
    body = made.get_json()
    assert body.pop("secret").startswith("whsec_")
    assert (body["url"], body["events"]) == (URL, list(EventType))
    two = client.post("/webhooks", json={"url": URL, "events": ["job.failed", "model.drifted", "job.failed"]})
    assert two.get_json()["events"] == ["job.failed", "model.drifted"]
    listed = client.get("/webhooks").get_json()
    assert (listed["has_more"], listed["data"][0], len(listed["data"])) == (False, body, 2)
    shown = client.get(made.headers["Location"])
    assert (shown.status_code, shown.get_json()) == (200, body)


def test_a_webhook_may_ask_for_some_kinds_of_jobs(client: FlaskClient) -> None:
    made = client.post("/webhooks", json={"url": URL, "kinds": ["train", "ingest"]}).get_json()
    assert made["kinds"] == client.get(f"/webhooks/{made['id']}").get_json()["kinds"] == ["train", "ingest"]


# --- the webhook of a single job ---

SECRET = "whsec_" + "c2VjcmV0" * 4
TRAIN = {"source_url": "https://example.org/ct.zip"}


@pytest.mark.parametrize("kind", ["train", "predict", "batch", "manifest"])
def test_every_submission_may_name_one(client: FlaskClient, sessions: Sessions, champion: object, kind: str) -> None:
    own = {"webhook": URL, "webhook_events": ["job.started", "job.failed"], "webhook_secret": SECRET}
    submitted = {
        "train": lambda: client.post("/jobs/train", json={**TRAIN, **own}),
        "predict": lambda: client.post("/jobs/predict", data={"file": file(png()), **own}),
        "batch": lambda: client.post("/jobs/predict/batch", data={"files": [file(png())], **own}),
        "manifest": lambda: client.post(
            "/jobs/predict/batch", query_string=own, data=b"scan_id\n" + scan(sessions), content_type="text/csv"
        ),
    }
    answer = submitted[kind]()
    assert answer.status_code == 202, answer.get_json()
    with sessions() as session:
        found = webhooks.receiver_of(session, uuid.UUID(answer.get_json()["id"]))
    assert found == Receiver(URL, SECRET, ["job.started", "job.failed"])
    assert client.get("/webhooks").get_json()["data"] == []


def scan(sessions: Sessions) -> bytes:
    with sessions.begin() as session:
        return str(builders.make_scan(session).id).encode()


@pytest.mark.parametrize(
    ("own", "pointer"),
    [
        ({"webhook": "http://127.0.0.1/"}, "/webhook"),
        ({"webhook": "http://169.254.169.254/latest"}, "/webhook"),
        ({"webhook": "https://me:secret@ris.example/"}, "/webhook"),
        ({"webhook": URL, "webhook_events": ["model.created"]}, "/webhook_events/0"),
        ({"webhook": URL, "webhook_secret": "whsec_short"}, "/webhook_secret"),
        ({"webhook_events": ["job.failed"]}, "/webhook_events"),
        ({"webhook_secret": SECRET}, "/webhook_secret"),
    ],
)
def test_an_address_that_no_webhook_may_have_is_refused_with_the_job(
    client: FlaskClient, champion: object, own: dict, pointer: str
) -> None:
    for path, body in (("train", TRAIN), ("predict", {"image": base64.b64encode(png()).decode()})):
        problem = assert_problem(client.post(f"/jobs/{path}", json={**body, **own}), 422)
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert client.get("/jobs?state=queued").get_json()["data"] == []


def test_sent_again_with_its_key_it_is_the_same_webhook_without_the_secret(client: FlaskClient) -> None:
    first, again = (
        client.post("/webhooks", json={"url": URL}, headers={"Idempotency-Key": "w"}).get_json() for _ in range(2)
    )
    assert (first["id"], again["secret"]) == (again["id"], None)
    assert first["secret"].startswith("whsec_")
    assert len(client.get("/webhooks").get_json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "ftp://ris.example/"}, "/url"),
        ({"url": "https://me:secret@ris.example/"}, "/url"),
        ({"url": "http://127.0.0.1/"}, "/url"),
        ({"url": "http://169.254.169.254/latest"}, "/url"),
        ({"url": "http://[::ffff:10.0.0.1]/"}, "/url"),
        ({"url": "http://localhost:9000/"}, "/url"),
        ({"url": URL, "events": []}, "/events"),
        ({"url": URL, "events": ["job.finished"]}, "/events/0"),
        ({"url": URL, "kinds": []}, "/kinds"),
        ({"url": URL, "kinds": ["explain"]}, "/kinds/0"),
    ],
)
def test_what_cannot_be_a_webhook_is_422(client: FlaskClient, body: dict, pointer: str) -> None:
    problem = assert_problem(client.post("/webhooks", json=body), 422)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_hosts_inside_the_network_are_refused_until_an_administrator_names_them(
    client: FlaskClient, door: Door
) -> None:
    refused = assert_problem(client.post("/webhooks", json={"url": "http://10.0.0.7:8443/"}), 422)
    assert "RENALQ_WEBHOOK_HOSTS" in refused["detail"]
    door.app.extensions["renalq"].settings.webhook_hosts = "10.0.0.7:8443"
    assert client.post("/webhooks", json={"url": "http://10.0.0.7:8443/"}).status_code == 201
    assert_problem(client.post("/webhooks", json={"url": "http://10.0.0.7/"}), 422)


def test_one_too_many_is_409_and_says_what_to_do(client: FlaskClient) -> None:
    for _ in range(webhooks.MAX_WEBHOOKS):
        assert client.post("/webhooks", json={"url": URL}).status_code == 201
    refused = assert_problem(client.post("/webhooks", json={"url": URL}), 409, "TOO_MANY_WEBHOOKS")
    assert "DELETE /webhooks/ID" in refused["detail"]
    client.delete(f"/webhooks/{client.get('/webhooks').get_json()['data'][0]['id']}")
    assert client.post("/webhooks", json={"url": URL}).status_code == 201


def test_a_deleted_webhook_is_gone_with_its_deliveries(client: FlaskClient, sessions: Sessions) -> None:
    path = f"/webhooks/{client.post('/webhooks', json={'url': URL}).get_json()['id']}"
    emit(sessions, "event")
    assert client.delete(path).status_code == 204
    assert_problem(client.delete(path), 404)
    assert_problem(client.get(f"{path}/deliveries"), 404)
    assert client.get("/webhooks").get_json()["data"] == []


def test_deliveries_are_paged_newest_first_and_say_what_became_of_them(client: FlaskClient, sessions: Sessions) -> None:
    path = f"/webhooks/{client.post('/webhooks', json={'url': URL}).get_json()['id']}/deliveries"
    emit(sessions, "first")
    fail_one(sessions)
    emit(sessions, "second", "third")
    page = client.get(f"{path}?limit=2").get_json()
    assert ([row["event_id"] for row in page["data"]], page["has_more"]) == (["third", "second"], True)
    assert page["data"][0] | {"id": "", "next_at": "", "created_at": ""} == {
        "id": "", "type": "job.succeeded", "event_id": "third", "state": "pending", "attempts": 0, "status": None,
        "error": None, "next_at": "", "created_at": "", "ended_at": None,
    }  # fmt: skip
    (last,) = client.get(f"{path}?limit=2&after={page['next']}").get_json()["data"]
    assert (last["event_id"], last["state"], last["attempts"], last["status"]) == ("first", "failed", 1, 500)
    assert last["error"] == "The receiver answered 500."
    assert last["ended_at"] is not None


def test_a_delivery_is_sent_anew_on_demand(client: FlaskClient, sessions: Sessions) -> None:
    path = f"/webhooks/{client.post('/webhooks', json={'url': URL}).get_json()['id']}/deliveries"
    emit(sessions, "event")
    fail_one(sessions)
    (failed,) = client.get(path).get_json()["data"]
    answer = client.post(f"{path}/{failed['id']}/redeliver")
    assert (answer.status_code, answer.get_json()["state"]) == (202, "pending")
    assert (answer.headers["Location"], answer.headers["Retry-After"]) == (path, "1")
    assert_problem(client.post(f"{path}/{builders.unknown_id()}/redeliver"), 404)


def test_who_may_read_jobs_may_look_and_no_more(door: Door, client: FlaskClient) -> None:
    path = f"/webhooks/{client.post('/webhooks', json={'url': URL}).get_json()['id']}"
    reader = door.client("jobs:read")
    assert reader.get("/webhooks").status_code == reader.get(f"{path}/deliveries").status_code == 200
    assert_problem(reader.post("/webhooks", json={"url": URL}), 403)
    assert_problem(reader.delete(path), 403)
    assert_problem(reader.post(f"{path}/deliveries/{builders.unknown_id()}/redeliver"), 403)
