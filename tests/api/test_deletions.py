"""Deletions over REST: receipts, refusals, and what answers afterwards."""

import time
import uuid

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select, text

from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.retention import blobs, deletions
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import IdempotencyKey, Job, ModelVersion, Scan, ScanResult
from tests import builders
from tests.api.conftest import Door, file, png
from tests.api.test_errors import assert_problem
from tests.depth import depth

MANY_SCANS = """
INSERT INTO scans (id, tenant_id, sha256, size, media_type)
SELECT gen_random_uuid(), 'default', encode(sha256(n::text::bytea), 'hex'), 1, 'image/png' FROM generate_series(1, :n) n
"""
MANY_RESULTS = """
INSERT INTO scan_results (job_id, ordinal, tenant_id, scan_id, state, label, finished_at)
SELECT CAST(:job AS uuid), row_number() OVER (), 'default', id, 'succeeded', 'Tumor', now() FROM scans
WHERE id NOT IN (SELECT scan_id FROM scan_results)
"""
SOON = {"deletion_grace_seconds": 1e-6}


def finish(sessions: Sessions, settings: Settings) -> None:
    """All that the leading dispatcher does."""
    store, hasty = BlobStore(settings.artifacts), settings.model_copy(update=SOON)
    more = True
    while more:
        with sessions.begin() as session:
            session.execute(text("UPDATE deletions SET due_at = now() WHERE finished_at IS NULL"))
            session.execute(text("UPDATE released_blobs SET due_at = now()"))
        more = deletions.step(sessions, store, hasty)
        blobs.step(sessions, store, hasty)


def ended(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        job = session.get_one(Job, uuid.UUID(job_id))
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))


def predicted(client: FlaskClient, sessions: Sessions, **headers: str) -> str:
    answer = client.post("/v1/jobs/predict", data={"file": file(png(), "canary.png")}, headers=headers)
    assert answer.status_code == 202, answer.get_json()
    ended(sessions, answer.get_json()["id"])
    return str(answer.get_json()["id"])


def test_a_job_is_deleted_with_its_scan_and_says_what_went(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    job_id = predicted(client, sessions, **{"Idempotency-Key": "once"})
    scan_id = client.get(f"/v1/jobs/{job_id}/results").get_json()["data"][0]["scan_id"]
    answer = client.delete(f"/v1/jobs/{job_id}")
    assert answer.status_code == 202
    receipt = answer.get_json()
    assert answer.headers["Location"].endswith(receipt["links"]["self"])
    assert (receipt["kind"], receipt["target"], receipt["state"]) == ("job", job_id, "deleting")
    for path in ("", "/results", "/events", "/artifacts", "/summary", "/studies"):
        assert_problem(client.get(f"/v1/jobs/{job_id}{path}"), 404)
    assert job_id not in [job["id"] for job in client.get("/v1/jobs").get_json()["data"]]
    finish(sessions, settings)
    found = client.get(receipt["links"]["self"]).get_json()
    assert found["state"] == "deleted"
    assert (found["counts"]["scans"], found["counts"]["files"], found["left"]) == (1, 1, {"files": 0, "mlflow_runs": 0})
    assert_problem(client.get(f"/v1/scans/{scan_id}"), 404)
    assert client.delete(f"/v1/jobs/{job_id}").get_json() == found, "a repeated request"
    assert [each["id"] for each in client.get("/v1/deletions").get_json()["data"]] == [receipt["id"]]
    with sessions() as session:
        assert session.scalars(select(IdempotencyKey.body)).all() == []


def test_a_scan_is_deleted_from_ended_jobs(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    made = client.post("/v1/scans", data={"file": file(png())}, headers={"Idempotency-Key": "scan"}).get_json()
    job = client.post("/v1/jobs/predict", json={"scan_id": made["id"], "custom_id": "canary"}).get_json()
    assert_problem(client.delete(f"/v1/scans/{made['id']}"), 409, "STILL_NEEDED")
    ended(sessions, job["id"])
    truth = f"/v1/jobs/{job['id']}/results/{made['id']}/truth"
    told = client.post(truth, json={"label": "Tumor"}, headers={"Idempotency-Key": "truth"})
    assert told.status_code == 201
    assert client.delete(f"/v1/scans/{made['id']}").status_code == 202
    assert client.get(f"/v1/scans/{made['id']}").status_code == 404
    assert client.post("/v1/scans/known", json={"sha256": [made["sha256"]]}).get_json()["data"] == {}
    finish(sessions, settings)
    row = client.get(f"/v1/jobs/{job['id']}/results").get_json()["data"][0]
    assert (row["state"], row["error"]["code"], row["label"]) == ("succeeded", "SCAN_DELETED", None)
    assert "canary" not in str(row)
    assert_problem(client.get(truth), 404)
    csv = client.get(f"/v1/jobs/{job['id']}/results", headers={"Accept": "text/csv"})
    assert b"SCAN_DELETED" in csv.data
    assert client.get(f"/v1/jobs/{job['id']}/summary").get_json()["errors"] == {"SCAN_DELETED": 1}
    again = client.post("/v1/scans", data={"file": file(png())}).get_json()
    assert again["id"] != made["id"]
    with sessions() as session:
        assert session.scalars(select(IdempotencyKey.key_sha256)).all() == []


def test_a_model_is_deleted_and_the_champion_is_not(
    client: FlaskClient, door: Door, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        other = builders.make_model(session, {"f1": 0.9})
    assert_problem(client.delete("/v1/models/champion"), 409, "STILL_NEEDED")
    assert_problem(client.delete(f"/v1/models/{champion.version}"), 409, "STILL_NEEDED")
    assert_problem(client.delete(f"/v1/jobs/{other.job_id}"), 409, "STILL_NEEDED")
    assert_problem(door.client("jobs:write").delete(f"/v1/models/{other.version}"), 403)
    answer = client.delete(f"/v1/models/{other.version}")
    assert (answer.status_code, answer.get_json()["target"]) == (202, str(other.version))
    for path in (f"/v1/models/{other.version}", f"/v1/models/{other.version}/weights", f"/v1/jobs/{other.job_id}"):
        assert_problem(client.get(path), 404)
    assert_problem(client.delete("/v1/models/99"), 404)


@pytest.mark.parametrize("path", ["jobs", "scans", "datasets", "deletions"])
def test_another_tenants_is_unknown(client: FlaskClient, path: str) -> None:
    verb = client.get if path == "deletions" else client.delete
    assert_problem(verb(f"/v1/{path}/{uuid.uuid4()}"), 404)


def test_an_unfinished_job_says_what_to_do(client: FlaskClient, champion: ModelVersion) -> None:
    job = client.post("/v1/jobs/predict", data={"file": file(png())}).get_json()
    body = assert_problem(client.delete(f"/v1/jobs/{job['id']}"), 409, "WRONG_STATE")
    assert f"POST /jobs/{job['id']}/cancel" in body["detail"]
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/jobs/{job['id']}?scans=keep").status_code == 202
    assert_problem(client.delete(f"/v1/jobs/{job['id']}?scans=burn"), 422)


def test_a_scan_that_goes_while_its_job_is_submitted_is_a_conflict(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two transactions of the request: nothing is acknowledged that cannot be done."""
    from api.intake import scan_store

    store = scan_store.store_scan

    def store_and_lose(*given: object) -> object:
        found = store(*given)  # type: ignore[arg-type]
        with sessions.begin() as session:
            session.execute(text("DELETE FROM scans"))
        return found

    monkeypatch.setattr(scan_store, "store_scan", store_and_lose)
    answer = client.post("/v1/jobs/predict", data={"file": file(png())})
    assert_problem(answer, 409, "SCAN_DELETED")
    assert "Retry-After" in answer.headers


def asked(client: FlaskClient, job_id: uuid.UUID) -> float:
    """Seconds until a deletion is accepted."""
    began = time.perf_counter()
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 202
    return time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.scaled
def test_a_large_batch_is_deleted_in_100_ms_and_then_in_batches(
    client: FlaskClient, sessions: Sessions, settings: Settings
) -> None:
    scans = depth(10_000, 100_000)
    with sessions.begin() as session:
        small, large = (builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=1).id for _ in "ab")
        for statement in MANY_SCANS, MANY_RESULTS:
            session.execute(text(statement), {"n": scans - 2, "job": str(large)})
    with sessions.begin() as session:
        session.execute(text("ANALYZE"))
    of_small, of_large = asked(client, small), asked(client, large)
    store, longest, steps = BlobStore(settings.artifacts), 0.0, 0
    more = True
    while more:
        began = time.perf_counter()
        more = deletions.step(sessions, store, settings)
        longest, steps = max(longest, time.perf_counter() - began), steps + 1
    with sessions() as session:
        assert session.scalars(select(ScanResult.job_id)).all() == session.scalars(select(Scan.id)).all() == []
    print(f"asked {1000 * of_large:.0f} ms, as {1000 * of_small:.0f}; {steps} batches, at most {1000 * longest:.0f} ms")
    assert of_large < max(0.1, 2 * of_small), "it does not depend on the number of scans"
    assert steps >= 2 * scans / 2000
    assert longest < 10
