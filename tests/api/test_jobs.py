"""Jobs by REST: submitted, listed, looked at, followed, cancelled."""

import threading
import time
import uuid

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api.resources.jobs import schemas
from jobs.db import Sessions
from jobs.queue import leases, lifecycle
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Job, ModelVersion
from tests import builders
from tests.api.conftest import Finish, file, png
from tests.api.test_errors import assert_problem
from tests.processes import eventually

KEYS = {
    "id", "kind", "pipeline", "task", "name", "state", "terminal", "cancel_requested", "stage", "stages", "progress",
    "eta_seconds", "queue_position", "attempt", "counts", "params", "dataset_id", "retry_of", "reproduction_of",
    "test_dataset_id", "reproduction", "model_version", "model_drift", "operating_point", "metrics", "error",
    "warnings", "metadata",
    "created_at", "started_at", "finished_at", "results_expired_at", "device_seconds", "scans_per_second", "engines",
    "links",
}  # fmt: skip
TRAIN = {"source_url": "https://example.org/ct.zip"}


def submit(client: FlaskClient, **more: object) -> dict:
    answer = client.post("/jobs/train", json={**TRAIN, **more})
    assert answer.status_code == 202, answer.get_json()
    return answer.get_json()


def test_a_training_is_accepted_with_its_address(client: FlaskClient) -> None:
    answer = client.post("/jobs/train", json={**TRAIN, "params": {"epochs": 3}, "metadata": {"study": "7"}})
    job = answer.get_json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["Retry-After"]) > 0
    assert set(job) == KEYS
    assert (job["kind"], job["state"], job["terminal"]) == ("train", "queued", False)
    assert (job["params"], job["metadata"]) == ({"epochs": 3}, {"study": "7"})
    assert job["counts"] == {"total": 1, "succeeded": 0, "failed": 0, "cancelled": 0, "pending": 1}
    assert uuid.UUID(job["id"]).version == 7
    assert job["created_at"].endswith("Z")
    for name, link in job["links"].items():
        assert client.open(link, method="POST" if name in ("cancel", "retry") else "GET").status_code < 410


def test_a_training_needs_a_dataset_that_is_ready(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        ready = builders.make_dataset(session).id
        checking = builders.make_dataset(session, state="checking").id
        foreign = builders.make_dataset(session, tenant_id="elsewhere").id
    answer = client.post("/jobs/train", json={"dataset_id": str(ready)})
    assert answer.get_json()["dataset_id"] == str(ready)
    assert_problem(client.post("/jobs/train", json={"dataset_id": str(checking)}), 409, "DATASET_NOT_READY")
    same = client.post("/jobs/train", json={"dataset_id": str(ready), "test_dataset_id": str(ready)})
    assert_problem(same, 422)
    for test, status in ((checking, 409), (foreign, 404)):
        body = {"dataset_id": str(ready), "test_dataset_id": str(test)}
        assert_problem(client.post("/jobs/train", json=body), status)
    assert_problem(client.post("/jobs/train", json={"dataset_id": str(foreign)}), 404)
    assert_problem(client.post("/jobs/train", json={"dataset_id": str(builders.unknown_id())}), 404)


def test_jobs_wait_in_the_order_in_which_they_came(client: FlaskClient) -> None:
    ids = [submit(client)["id"] for _ in range(3)]
    assert [client.get(f"/jobs/{id_}").get_json()["queue_position"] for id_ in ids] == [0, 1, 2]
    client.post(f"/jobs/{ids[0]}/cancel")
    assert [client.get(f"/jobs/{id_}").get_json()["queue_position"] for id_ in ids] == [None, 0, 1]


def test_an_unchanged_job_is_304_and_a_changed_one_is_not(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session)
        unit = builders.units_of(session, job)[0]
    first = client.get(f"/jobs/{job.id}")
    match = {"If-None-Match": first.headers["ETag"]}
    again = client.get(f"/jobs/{job.id}", headers=match)
    assert (again.status_code, again.data, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert "Retry-After" in first.headers
    with sessions.begin() as session:
        held = builders.claim(session, unit)
        lifecycle.report(session, held, stage="training", progress=0.5)
    changed = client.get(f"/jobs/{job.id}", headers=match)
    assert changed.status_code == 200
    assert (changed.get_json()["stage"], changed.get_json()["progress"]) == ("training", 0.5)
    assert changed.get_json()["eta_seconds"] >= 0


def test_a_finished_job_asks_nobody_to_come_back(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.FAILED)
    answer = client.get(f"/jobs/{job.id}")
    assert "Retry-After" not in answer.headers
    assert answer.get_json()["terminal"] is True
    assert answer.get_json()["error"] == builders.BROKEN


@pytest.mark.parametrize(
    ("state", "error"),
    [("succeeded", None), ("partially_succeeded", None), ("failed", builders.BROKEN), ("cancelled", builders.BROKEN)],
)
def test_the_error_of_a_job_of_an_earlier_release_is_a_warning_unless_it_failed(state: str, error: dict | None) -> None:
    job = Job(state=state, error=builders.BROKEN)
    assert (schemas.error(job), schemas.warnings(job)) == (error, [] if error else [builders.BROKEN])


def test_pages_hold_every_job_once_newest_first(client: FlaskClient) -> None:
    ids = [submit(client)["id"] for _ in range(5)]
    seen: list[str] = []
    after = ""
    while True:
        page = client.get(f"/jobs?limit=2{after}").get_json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        submit(client)  # newer ones shift nothing
        after = f"&after={page['next']}"
    assert seen == ids[::-1]
    assert page["next"] is None


def test_filters_find_what_they_name(client: FlaskClient, sessions: Sessions) -> None:
    first = submit(client, metadata={"study": "7", "n": 5, "urgent": True})
    second = submit(client, metadata={"study": "8"})
    with sessions.begin() as session:
        third = builders.make_job(session, JobKind.INGEST, JobState.SUCCEEDED)

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/jobs?{query}").get_json()["data"]]

    assert found("metadata[study]=7") == [first["id"]]
    assert found("metadata[study]=7&metadata[n]=5&metadata[urgent]=true") == [first["id"]]
    assert found("metadata[study]=9") == []
    assert found("state=succeeded") == [str(third.id)]
    assert found("kind=train&state=queued") == [second["id"], first["id"]]
    assert found(f"created_after={second['created_at']}") == [str(third.id)]


def test_cancelling_twice_is_the_same_and_too_late_is_409(client: FlaskClient, sessions: Sessions) -> None:
    job = submit(client)
    for _ in range(2):
        answer = client.post(f"/jobs/{job['id']}/cancel")
        assert (answer.status_code, answer.get_json()["state"]) == (202, "cancelled")
        assert answer.get_json()["cancel_requested"] is True
        assert answer.headers["Location"] == f"/jobs/{job['id']}"
    with sessions.begin() as session:
        ended = builders.make_job(session, state=JobState.SUCCEEDED)
    assert_problem(client.post(f"/jobs/{ended.id}/cancel"), 409, "WRONG_STATE")


def test_metrics_show_the_epochs_of_the_latest_attempt(client: FlaskClient, sessions: Sessions) -> None:
    def epoch(held: leases.Claim, number: int, loss: float) -> None:
        lifecycle.report(session, held, progress=0.1, event=("epoch", {"epoch": number, "train_loss": loss}))

    with sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        epoch(held, 1, 0.9)
        epoch(held, 2, 0.8)
        lifecycle.requeue(session, held, "DRAINED")
        held = builders.claim(session, builders.units_of(session, job)[0])
        epoch(held, 1, 0.7)
        lifecycle.succeed(session, held, metrics={"f1": 0.95})
    metrics = client.get(f"/jobs/{job.id}/metrics").get_json()
    assert [(one["epoch"], one["train_loss"]) for one in metrics["epochs"]] == [(1, 0.7)]
    assert metrics["final"] == {"f1": 0.95}


def test_a_job_links_to_its_run_where_people_can_reach_mlflow(
    app: Flask, client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
    monkeypatch.setattr(app.extensions["renalq"].settings, "mlflow_public_url", "https://mlflow.example/")
    assert "mlflow" not in client.get(f"/jobs/{job.id}").get_json()["links"]
    with sessions.begin() as session:
        lifecycle.report(session, held, mlflow_run_id="0123abcd")
    link = client.get(f"/jobs/{job.id}").get_json()["links"]["mlflow"]
    assert link == "https://mlflow.example/#/runs/0123abcd"
    monkeypatch.setattr(app.extensions["renalq"].settings, "mlflow_public_url", "")
    assert "mlflow" not in client.get(f"/jobs/{job.id}").get_json()["links"]


def test_artifacts_come_as_attachments_that_no_browser_runs(
    client: FlaskClient, sessions: Sessions, settings: Settings, tmp_path: object
) -> None:
    import io

    blob = BlobStore(settings.artifacts).put(io.BytesIO(b"<script>"))
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.SUCCEEDED)
        session.add(
            Artifact(job_id=job.id, name="report.html", tenant_id=builders.TENANT, media_type="text/html", **vars(blob))
        )
    listed = client.get(f"/jobs/{job.id}/artifacts").get_json()["data"]
    assert [(one["name"], one["size"]) for one in listed] == [("report.html", 8)]
    answer = client.get(listed[0]["links"]["self"])
    assert answer.data == b"<script>"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["Content-Length"] == "8"
    again = client.get(listed[0]["links"]["self"], headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304
    assert_problem(client.get(f"/jobs/{job.id}/artifacts/nothing.png"), 404)


# --- waiting ---


def test_who_prefers_to_wait_gets_the_finished_job(client: FlaskClient, champion: ModelVersion, finish: Finish) -> None:
    def work() -> None:
        while not (queued := client.get("/jobs?state=queued").get_json()["data"]):
            time.sleep(0.02)
        finish(queued[0]["id"])

    worker = threading.Thread(target=work)
    worker.start()
    began = time.monotonic()
    answer = client.post("/jobs/predict", data={"file": file(png())}, headers={"Prefer": "wait=20"})
    worker.join()
    assert (answer.status_code, answer.get_json()["state"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=20"
    assert time.monotonic() - began < 10


def test_who_waits_in_vain_gets_202(client: FlaskClient, champion: ModelVersion) -> None:
    began = time.monotonic()
    answer = client.post("/jobs/predict", data={"file": file(png())}, headers={"Prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.get_json()["terminal"]) == (202, False)
    assert 0.9 < time.monotonic() - began < 3


def test_a_long_poll_is_answered_when_the_job_changes_or_the_time_is_over(
    client: FlaskClient, sessions: Sessions
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session)
        unit = builders.units_of(session, job)[0]

    def claim() -> None:
        with sessions.begin() as session:
            builders.claim(session, unit)

    known = client.get(f"/jobs/{job.id}").headers["ETag"]
    began = time.monotonic()
    threading.Timer(0.5, claim).start()
    changed = client.get(f"/jobs/{job.id}", headers={"If-None-Match": known, "Prefer": "wait=20"})
    assert (changed.status_code, changed.get_json()["state"]) == (200, "running")
    assert changed.headers["Preference-Applied"] == "wait=20"
    assert time.monotonic() - began < 10
    headers = {"If-None-Match": changed.headers["ETag"], "Prefer": "wait=1"}
    assert client.get(f"/jobs/{job.id}", headers=headers).status_code == 304
    assert client.get(f"/jobs/{job.id}", headers={"Prefer": "wait=1"}).get_json()["state"] == "running"


def test_with_no_slot_left_nobody_waits(app: Flask, client: FlaskClient, champion: ModelVersion) -> None:
    app.extensions["renalq"].listener._slots = 0
    answer = client.post("/jobs/predict", data={"file": file(png())}, headers={"Prefer": "wait=20"})
    assert answer.status_code == 202
    assert "Preference-Applied" not in answer.headers
    stream = client.get(answer.get_json()["links"]["events"], headers={"Accept": "text/event-stream"})
    assert_problem(stream, 503, "TOO_MANY_WATCHERS")
    assert "Retry-After" in stream.headers


def test_shutting_down_wakes_who_waits(app: Flask, client: FlaskClient, champion: ModelVersion) -> None:
    threading.Timer(0.5, app.extensions["renalq"].listener.close).start()
    began = time.monotonic()
    answer = client.post("/jobs/predict", data={"file": file(png())}, headers={"Prefer": "wait=30"})
    assert answer.status_code == 202
    assert time.monotonic() - began < 5


def test_waiters_look_for_themselves_while_nobody_listens(
    app: Flask, client: FlaskClient, champion: ModelVersion, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.extensions["renalq"].listener, "_start", lambda: None)
    monkeypatch.setattr("api.http.change_listener.POLL_SECONDS", 0.2)
    job = client.post("/jobs/predict", data={"file": file(png())}).get_json()
    threading.Timer(0.5, finish, [job["id"]]).start()
    lines = client.get(job["links"]["events"], headers={"Accept": "text/event-stream"}).get_data(as_text=True)
    assert "event: succeeded" in lines


# --- events ---


def test_events_are_paged_oldest_first(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.SUCCEEDED)
    first = client.get(f"/jobs/{job.id}/events?limit=2").get_json()
    rest = client.get(f"/jobs/{job.id}/events?after={first['next']}").get_json()
    assert [event["type"] for event in first["data"] + rest["data"]] == ["submitted", "claimed", "succeeded"]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_a_stream_replays_what_was_missed_and_ends_with_the_job(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.SUCCEEDED)
    known = client.get(f"/jobs/{job.id}/events").get_json()["data"]
    answer = client.get(
        f"/jobs/{job.id}/events",
        headers={"Accept": "text/event-stream", "Last-Event-ID": str(known[0]["id"])},
    )
    assert answer.mimetype == "text/event-stream"
    lines = answer.get_data(as_text=True).splitlines()
    assert [line for line in lines if line.startswith("event")] == ["event: claimed", "event: succeeded"]
    assert f"id: {known[-1]['id']}" in lines


def test_a_stream_tells_of_events_as_they_happen(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.RUNNING)
        unit = builders.units_of(session, job)[0]
    mine = unit.fence or 0, unit.worker or ""
    held = leases.Claim(unit.id, job.id, builders.TENANT, JobKind.TRAIN, unit.attempt, *mine)

    def work() -> None:
        time.sleep(0.5)
        with sessions.begin() as session:
            lifecycle.report(session, held, progress=0.5, event=("epoch", {"epoch": 1}))
        time.sleep(0.3)
        with sessions.begin() as session:
            lifecycle.succeed(session, held)

    worker = threading.Thread(target=work)
    worker.start()
    began = time.monotonic()
    times = {}
    answer = client.get(f"/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}, buffered=False)
    for piece in answer.response:
        text = piece.decode() if isinstance(piece, bytes) else piece
        times[text.partition("event: ")[2].partition("\n")[0]] = time.monotonic() - began
    worker.join()
    assert 0.4 < times["epoch"] < 1.5
    assert times["epoch"] < times["succeeded"] < 3


def test_a_quiet_stream_says_that_it_is_still_there(
    client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.responses.KEEP_ALIVE_SECONDS", 0.2)
    with sessions.begin() as session:
        job = builders.make_job(session)
    threading.Timer(1.0, client.post, [f"/jobs/{job.id}/cancel"]).start()
    stream = client.get(f"/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}).get_data(as_text=True)
    assert stream.count(": still here") >= 2
    assert "event: cancelled" in stream


def test_who_waits_holds_no_database_connection(app: Flask, client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = session.get_one(Job, builders.make_job(session).id)
    answer = client.get(f"/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}, buffered=False)
    pieces = iter(answer.response)
    next(pieces)
    next(pieces)
    assert app.extensions["renalq"].listener.waiting == 1
    eventually(lambda: app.extensions["renalq"].sessions.kw["bind"].pool.checkedout() == 0, 5)
    answer.close()
    assert app.extensions["renalq"].listener.waiting == 0
