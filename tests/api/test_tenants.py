"""Who sees what; models and keys; whether the stack is ready."""

import re
from collections.abc import Mapping

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select

from jobs import stack_state
from jobs.db import Sessions
from jobs.deletions.of_jobs import delete_job
from jobs.events import webhooks
from jobs.events.webhooks import EventType
from jobs.queue import processes
from jobs.queue.processes import Heartbeat
from jobs.settings import Settings
from jobs.stack_state import ServiceState
from jobs.states import JobKind, JobState
from jobs.tables import Artifact, Delivery, ModelVersion, Scan
from tests import builders
from tests.api.conftest import Door, file, png
from tests.api.test_errors import assert_problem

UPLOADS = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
"""Without these /uploads asks for them first."""


def told(client: FlaskClient, method: str, path: str) -> dict:
    bodies = {"truth": {"label": "Tumor"}, "rotate": {}}
    name = path.rpartition("/")[2]
    sent = {"json": bodies[name]} if name in bodies else {"headers": UPLOADS}
    body = assert_problem(client.open(path, method=method, **sent), 404)
    return {key: value for key, value in body.items() if key not in ("instance", "request_id")}


def routes_with_an_id(app: Flask) -> list[tuple[str, str]]:
    """Every method and rule that names something by its id: new routes are tested without being listed here."""
    return [
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        if "<id:" in rule.rule
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]


def filled(rule: str, ids: Mapping[str, object]) -> str:
    """The rule's path, with each of its ids."""
    return re.sub("<id:([a-z_]+)>", lambda found: str(ids[found[1]]), rule).replace("<path:name>", "a.png")


def test_what_belongs_to_another_tenant_answers_like_what_does_not_exist(
    client: FlaskClient, stranger: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT, JobState.SUCCEEDED, scans=1, model_id=champion.id)
        session.add(
            Artifact(
                job_id=job.id, name="a.png", tenant_id=job.tenant_id, sha256="a" * 64, size=1, media_type="image/png"
            )
        )
        dataset = builders.make_dataset(session)
        scan = session.scalars(select(Scan)).one()
    assert len(routes_with_an_id(client.application)) >= 11
    key = client.get("/keys").get_json()["data"][0]["id"]
    upload = client.post("/uploads", headers={**UPLOADS, "Upload-Length": "5"}).get_json()["id"]
    webhook = client.post("/webhooks", json={"url": "https://ris.example/"}).get_json()["id"]
    ids = {"job_id": job.id, "dataset_id": dataset.id, "scan_id": scan.id, "key_id": key, "upload_id": upload}
    with sessions.begin() as session:
        webhooks.emit(session, builders.TENANT, "event", EventType.JOB_SUCCEEDED, {})
        delivery = session.scalars(select(Delivery.id)).one()
        ended = builders.make_job(session, JobKind.PREDICT, JobState.CANCELLED, scans=1)
        deletion = delete_job(session, builders.TENANT, ended.id).id
    ids |= {"webhook_id": webhook, "delivery_id": delivery, "deletion_id": deletion}
    unknown = {name: builders.unknown_id() for name in ids}
    for method, rule in routes_with_an_id(client.application):
        theirs, nobodys = filled(rule, ids), filled(rule, unknown)
        assert told(stranger, method, theirs) == told(stranger, method, nobodys), (method, rule)
    assert told(stranger, "GET", "/models/1") == told(stranger, "GET", "/models/2")
    for path in ("/jobs", "/datasets", "/models", "/webhooks"):
        assert stranger.get(path).get_json()["data"] == []
    for body in ({"scan_id": str(scan.id)}, {"image": str(scan.id)}):
        with_model = stranger.post("/jobs/predict", json=body)
        assert with_model.status_code in (404, 409)
    accept = {"Accept": "text/event-stream"}
    assert_problem(stranger.get(f"/jobs/{job.id}/events", headers=accept), 404)
    assert client.get(f"/jobs/{job.id}").status_code == 200
    truth = client.post(f"/jobs/{job.id}/results/{scan.id}/truth", json={"label": "Tumor"})
    again = client.post(f"/webhooks/{webhook}/deliveries/{delivery}/redeliver")
    assert (truth.status_code, again.status_code) == (201, 202), "to their owner they are there"


def test_a_model_says_what_it_was_made_of(client: FlaskClient, champion: ModelVersion) -> None:
    model = client.get("/models/champion").get_json()
    assert model == client.get("/models/1").get_json() == client.get("/models").get_json()["data"][0]
    assert (model["version"], model["champion"], model["metrics"]) == ("1", True, builders.SCORES)
    assert model["gate"]["promoted"] is True
    assert client.get(f"/jobs/{model['job_id']}").get_json()["model_version"] == model["version"]


def test_a_key_is_shown_once_and_makes_no_more_of_itself(client: FlaskClient, door: Door) -> None:
    made = client.post("/keys", json={"name": "reader", "scopes": ["jobs:read"]})
    assert made.status_code == 201
    assert made.get_json()["secret"].startswith("rq_")
    listed = client.get("/keys").get_json()["data"]
    assert [key["name"] for key in listed] == ["test", "reader"]
    assert not any("secret" in key for key in listed)
    assert client.get(made.headers["Location"]).get_json() == listed[1]
    assert_problem(door.client("jobs:write", "jobs:read", "models:write").post("/keys", json={}), 403)


@pytest.mark.parametrize("body", [{}, {"name": "x", "scopes": []}, {"name": "x", "scopes": ["god"]}, {"name": 1}])
def test_an_ill_typed_key_is_422(client: FlaskClient, body: dict) -> None:
    assert_problem(client.post("/keys", json=body), 422)


def test_readiness_names_what_is_missing(client: FlaskClient, sessions: Sessions) -> None:
    def reasons() -> str:
        return " ".join(client.get("/health/ready").get_json()["reasons"])

    assert "no dispatcher" in reasons()
    with sessions.begin() as session:
        processes.upsert(session, Heartbeat("d", processes.DISPATCHER, broker_reachable=False))
    assert "cannot reach Redis" in reasons()
    with sessions.begin() as session:
        processes.upsert(session, Heartbeat("d", processes.DISPATCHER, broker_reachable=True))
        processes.upsert(session, Heartbeat("p", processes.WORKER, ["urgent", "batch"]))
    assert reasons() == "worker: no live worker serves the lane train."
    assert_problem(client.get("/health/ready"), 503, "NOT_READY")
    with sessions.begin() as session:
        processes.upsert(session, Heartbeat("t", processes.WORKER, ["train"]))
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.get_json()) == (200, {"status": "ready", "reasons": [], "degraded": []})


def test_health_tells_of_a_dead_process_that_jobs_do_not_need(
    client: FlaskClient, sessions: Sessions, settings: Settings
) -> None:
    with sessions.begin() as session:
        processes.upsert(session, Heartbeat("d", processes.DISPATCHER, broker_reachable=True))
        processes.upsert(session, Heartbeat("w", processes.WORKER, ["urgent", "batch", "train"]))
    sentence = "mlflow: restarting, since it was killed by SIGKILL. Jobs go on without it."
    assert client.get("/health").get_json()["status"] == "healthy"
    dead = builders.service("mlflow", ServiceState.RESTARTING, last_death="was killed by SIGKILL")
    stack_state.write(settings.home, builders.stack(dead))
    ready, whole = client.get("/health/ready"), client.get("/health").get_json()
    assert (ready.status_code, ready.get_json()) == (200, {"status": "ready", "reasons": [], "degraded": [sentence]})
    assert (whole["status"], whole["reasons"]) == ("degraded", [sentence])
    with sessions.begin() as session:
        processes.deregister(session, "w")
    assert client.get("/health/ready").get_json()["degraded"] == [sentence]


def test_probes_need_no_key(door: Door) -> None:
    probe = door.app.test_client()
    assert probe.get("/health/live").status_code == 200
    assert probe.get("/health/ready").status_code == 503
    assert probe.get("/openapi.json").status_code == 200


def test_uploads_leave_nothing_behind(client: FlaskClient, settings) -> None:  # type: ignore[no-untyped-def]
    client.post("/scans", data={"file": file(b"no image")})
    client.post("/datasets", data={"file": file(b"no zip")})
    left = [path for path in settings.home.rglob("*") if path.is_file() and path.name != builders.WEIGHTS]
    assert left == []
    client.post("/scans", data={"file": file(png())})
    left = [path for path in settings.home.rglob("*") if path.is_file() and path.name != builders.WEIGHTS]
    assert len(left) == 1
