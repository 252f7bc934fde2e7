"""One Idempotency-Key makes one thing, whatever is sent again, at once, or after somebody died."""

import datetime as dt
import threading
import uuid
from collections import Counter

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from jobs import idempotency
from jobs.db import Sessions
from jobs.tables import ApiKey, Dataset, IdempotencyKey, Job, ModelVersion, Scan
from tests.api.conftest import Door, Finish, file, png, zipped
from tests.api.test_errors import assert_problem

TRAIN = {"source_url": "https://example.org/ct.zip"}
KEY = {"Idempotency-Key": "order-4711"}
REPLAYED = "Idempotent-Replayed"
CANCELS = {"jobs.cancel_job", "scans.find_known", "webhooks.redeliver"}
"""POSTs that make nothing: repeated, they change nothing of themselves."""


def count(sessions: Sessions, table: type) -> int:
    with sessions.begin() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def age(sessions: Sessions, seconds: float) -> None:
    """Let time pass for all keys."""
    with sessions.begin() as session:
        past = func.clock_timestamp() - dt.timedelta(seconds=seconds)
        session.execute(update(IdempotencyKey).values(locked_at=past, created_at=past))


def left_unanswered(sessions: Sessions, seconds: float = 61) -> None:
    """What a process leaves that died before it kept its answer."""
    with sessions.begin() as session:
        session.execute(update(IdempotencyKey).values(status=None, headers=None, body=None))
    age(sessions, seconds)


def test_the_same_request_gets_the_first_answer_again(client: FlaskClient, sessions: Sessions, finish: Finish) -> None:
    first = client.post("/jobs/train", json=TRAIN, headers=KEY)
    finish(first.get_json()["id"])
    again = client.post("/jobs/train", json=TRAIN, headers=KEY)
    assert (again.status_code, again.data) == (202, first.data)
    assert {"Location", "Retry-After", "Content-Type"} <= {
        name for name, value in again.headers.items() if first.headers.get(name) == value
    }
    assert again.headers[REPLAYED] == "true"
    assert REPLAYED not in first.headers
    assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert count(sessions, Job) == 1


def test_the_order_of_fields_and_the_key_in_quotes_are_no_difference(client: FlaskClient, sessions: Sessions) -> None:
    client.post("/jobs/train", json={**TRAIN, "name": "a"}, headers=KEY)
    again = client.post(
        "/jobs/train",
        data=b'{"name":"a",  "source_url":"https://example.org/ct.zip"}',
        content_type="application/json",
        headers={"Idempotency-Key": '"order-4711"'},
    )
    assert again.headers[REPLAYED] == "true"


def test_without_a_key_each_request_makes_its_own(client: FlaskClient, sessions: Sessions) -> None:
    for _ in range(2):
        assert client.post("/jobs/train", json=TRAIN).status_code == 202
    assert count(sessions, Job) == 2
    assert count(sessions, IdempotencyKey) == 0


@pytest.mark.parametrize("path", ["/jobs/train", "/jobs/predict"])
def test_another_request_with_the_key_is_422(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, path: str
) -> None:
    before = count(sessions, Job)
    client.post("/jobs/train", json=TRAIN, headers=KEY)
    body = {"image": "AAAA"} if path == "/jobs/predict" else {**TRAIN, "name": "another"}
    assert_problem(client.post(path, json=body, headers=KEY), 422, "IDEMPOTENCY_KEY_REUSED")
    assert_problem(client.post("/jobs/train?x=1", json=TRAIN, headers=KEY), 422, "IDEMPOTENCY_KEY_REUSED")
    assert count(sessions, Job) == before + 1


@pytest.mark.parametrize("given", ["", "x" * 256, "two words", "ümlaut", "tab\tbed"])
def test_a_key_that_is_none_is_422_and_the_header_named(client: FlaskClient, given: str) -> None:
    answer = client.post("/jobs/train", json=TRAIN, environ_overrides={"HTTP_IDEMPOTENCY_KEY": given})
    assert assert_problem(answer, 422)["errors"][0]["pointer"] == "/Idempotency-Key"


def test_a_key_may_be_255_characters_long(client: FlaskClient) -> None:
    assert client.post("/jobs/train", json=TRAIN, headers={"Idempotency-Key": "x" * 255}).status_code == 202


def test_an_error_gives_the_key_up(client: FlaskClient, sessions: Sessions) -> None:
    assert_problem(client.post("/jobs/predict", data={"file": file(png())}, headers=KEY), 409, "NO_CHAMPION")
    assert client.post("/jobs/train", json=TRAIN, headers=KEY).status_code == 202
    assert_problem(client.post("/jobs/train", json={"colour": 1}, headers={"Idempotency-Key": "b"}), 422, "INVALID")
    assert client.post("/jobs/train", json=TRAIN, headers={"Idempotency-Key": "b"}).status_code == 202


def test_tenants_do_not_see_each_others_keys(client: FlaskClient, stranger: FlaskClient) -> None:
    mine = client.post("/jobs/train", json=TRAIN, headers=KEY).get_json()
    theirs = stranger.post("/jobs/train", json={**TRAIN, "name": "theirs"}, headers=KEY)
    assert (theirs.status_code, REPLAYED in theirs.headers) == (202, False)
    assert theirs.get_json()["id"] != mine["id"]


def test_a_scope_is_asked_for_before_an_answer_comes_again(client: FlaskClient, door: Door) -> None:
    client.post("/jobs/train", json=TRAIN, headers=KEY)
    assert_problem(door.client("jobs:read").post("/jobs/train", json=TRAIN, headers=KEY), 403)


# --- uploads ---


def batch(client: FlaskClient, *contents: bytes, name: str = "a.png", **fields: str) -> TestResponse:
    parts = {"files": [file(content, name) for content in contents], **fields}
    return client.post("/jobs/predict/batch", data=parts, headers=KEY)


def test_an_upload_is_the_same_by_its_files_not_by_its_boundary(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    first = batch(client, png(shade=1), png(shade=2), metadata='{"a": 1}')
    assert first.status_code == 202
    again = batch(client, png(shade=1), png(shade=2), metadata='{"a":  1}')
    assert (again.data, again.headers[REPLAYED]) == (first.data, "true")
    for other in (
        batch(client, png(shade=1), png(shade=3), metadata='{"a": 1}'),
        batch(client, png(shade=2), png(shade=1), metadata='{"a": 1}'),
        batch(client, png(shade=1), png(shade=2), metadata='{"a": 2}'),
        batch(client, png(shade=1), png(shade=2), name="b.png", metadata='{"a": 1}'),
        batch(client, png(shade=1), metadata='{"a": 1}'),
    ):
        assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")


def test_the_scans_of_a_keyed_upload_are_stored_whole(
    client: FlaskClient, champion: ModelVersion, finish: Finish
) -> None:
    job = batch(client, png(shade=1), png(shade=2)).get_json()
    assert job["counts"] == {"total": 2, "succeeded": 0, "failed": 0, "cancelled": 0, "pending": 2}


def test_one_scan_one_dataset_one_key(client: FlaskClient, sessions: Sessions, champion: ModelVersion) -> None:
    kidneys = zipped({f"{label}/{n}.png": png(shade=n) for label in ("Normal", "Tumor") for n in range(2)})
    calls = {
        "/jobs/predict": lambda: {"data": {"file": file(png())}},
        "/scans": lambda: {"data": {"file": file(png())}},
        "/datasets": lambda: {"data": {"file": file(kidneys, "kidneys.zip")}},
        "/keys": lambda: {"json": {"name": "bridge", "scopes": ["jobs:read"]}},
    }
    for number, (path, request) in enumerate(calls.items()):
        key = {"Idempotency-Key": f"key-{number}"}
        first, again = (client.post(path, headers=key, **request()) for _ in range(2))
        assert (again.status_code, again.headers.get(REPLAYED)) == (first.status_code, "true"), path
        assert again.headers["Location"] == first.headers["Location"]
        assert again.get_json()["id"] == first.get_json()["id"]
    assert (count(sessions, Scan), count(sessions, Dataset)) == (1, 1)


def test_a_keys_secret_is_kept_nowhere(client: FlaskClient, sessions: Sessions) -> None:
    request = {"name": "bridge", "scopes": ["jobs:read"]}
    made = client.post("/keys", json=request, headers=KEY).get_json()
    before = count(sessions, ApiKey)
    again = client.post("/keys", json=request, headers=KEY).get_json()
    assert again == {**made, "secret": None}
    assert made["secret"].startswith("rq_")
    assert count(sessions, ApiKey) == before
    with sessions.begin() as session:
        dump = "".join(session.scalars(text("SELECT idempotency_keys::text FROM idempotency_keys")))
    assert made["secret"] not in dump
    assert made["id"] in dump
    assert KEY["Idempotency-Key"] not in dump


# --- at once ---


def test_fifty_at_once_make_one_job(app: Flask, door: Door, sessions: Sessions) -> None:
    bearer = door.client().environ_base["HTTP_AUTHORIZATION"]
    answers: list[TestResponse] = []
    start = threading.Barrier(50)

    def send() -> None:
        start.wait()
        answers.append(app.test_client().post("/jobs/train", json=TRAIN, headers={**KEY, "Authorization": bearer}))

    threads = [threading.Thread(target=send) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(sessions, Job) == 1
    told = Counter(answer.status_code for answer in answers)
    assert set(told) <= {202, 409}
    assert told[202] >= 1
    assert len({answer.data for answer in answers if answer.status_code == 202}) == 1
    assert sum(REPLAYED not in answer.headers for answer in answers if answer.status_code == 202) == 1
    for answer in answers:
        if answer.status_code == 409:
            assert_problem(answer, 409, "IDEMPOTENCY_IN_FLIGHT")
            assert answer.headers["Retry-After"] == "1"


def test_while_the_first_is_in_flight_the_same_is_409_and_another_422(client: FlaskClient, sessions: Sessions) -> None:
    client.post("/jobs/train", json=TRAIN, headers=KEY)
    left_unanswered(sessions, seconds=50)
    assert_problem(client.post("/jobs/train", json=TRAIN, headers=KEY), 409, "IDEMPOTENCY_IN_FLIGHT")
    other = client.post("/jobs/train", json={**TRAIN, "name": "b"}, headers=KEY)
    assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")


# --- after a death ---


def test_what_died_before_its_commit_is_done_anew_after_a_minute(client: FlaskClient, sessions: Sessions) -> None:
    client.post("/jobs/train", json=TRAIN, headers=KEY)
    with sessions.begin() as session:
        session.execute(text("DELETE FROM jobs"))
    left_unanswered(sessions)
    answer = client.post("/jobs/train", json=TRAIN, headers=KEY)
    assert (answer.status_code, REPLAYED in answer.headers) == (202, False)
    assert count(sessions, Job) == 1


def test_what_died_after_its_commit_is_found_again(client: FlaskClient, sessions: Sessions) -> None:
    first = client.post("/jobs/train", json=TRAIN, headers=KEY)
    left_unanswered(sessions)
    assert_problem(client.post("/jobs/train", json={**TRAIN, "name": "b"}, headers=KEY), 422, "IDEMPOTENCY_KEY_REUSED")
    found = client.post("/jobs/train", json=TRAIN, headers=KEY)
    assert (found.status_code, found.headers[REPLAYED]) == (202, "true")
    assert found.headers["Location"] == first.headers["Location"]
    assert client.post("/jobs/train", json=TRAIN, headers=KEY).data == found.data
    assert count(sessions, Job) == 1


def test_a_dataset_that_died_after_its_commit_is_found_again(client: FlaskClient, sessions: Sessions) -> None:
    kidneys = zipped({"Normal/a.png": png(shade=1), "Tumor/b.png": png(shade=2)})
    first = client.post("/datasets", data={"file": file(kidneys, "k.zip")}, headers=KEY)
    left_unanswered(sessions)
    found = client.post("/datasets", data={"file": file(kidneys, "k.zip")}, headers=KEY)
    assert (found.status_code, found.headers["Location"]) == (202, first.headers["Location"])
    assert (count(sessions, Dataset), count(sessions, Job)) == (1, 1)


def test_an_error_after_the_commit_makes_no_second_job(
    app: Flask, client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object) -> None:
        raise OperationalError("SELECT", {}, Exception("the connection is lost"))

    with monkeypatch.context() as patch:
        patch.setattr("api.http.waiting.job", gone)
        assert_problem(client.post("/jobs/train", json=TRAIN, headers=KEY), 503, "UNAVAILABLE")
    assert count(sessions, Job) == 1
    other = client.post("/jobs/train", json={**TRAIN, "name": "b"}, headers=KEY)
    assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")
    again = client.post("/jobs/train", json=TRAIN, headers=KEY)  # at once: nobody waits out the lock
    assert (again.status_code, again.headers[REPLAYED]) == (202, "true")
    assert count(sessions, Job) == 1


def test_who_was_taken_for_dead_and_was_only_slow_makes_no_second_job(
    app: Flask, client: FlaskClient, sessions: Sessions, champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one is inside its upload when its lock runs out; the row's unique key stops it at its own INSERT."""
    from api.intake import scan_store

    before = count(sessions, Job)
    reached, go_on, store_scans = threading.Event(), threading.Event(), scan_store.store_scans
    slow: list[TestResponse] = []

    def held_up(scans, inputs):  # type: ignore[no-untyped-def]
        results = store_scans(scans, inputs)
        if threading.current_thread() is thread:
            reached.set()
            assert go_on.wait(30)
        return results

    monkeypatch.setattr(scan_store, "store_scans", held_up)
    bearer = {"Authorization": client.environ_base["HTTP_AUTHORIZATION"]}

    def send() -> None:
        parts = {"files": [file(png())]}
        slow.append(app.test_client().post("/jobs/predict/batch", data=parts, headers={**KEY, **bearer}))

    thread = threading.Thread(target=send)
    thread.start()
    assert reached.wait(30)
    age(sessions, 61)
    quick = client.post("/jobs/predict/batch", data={"files": [file(png())]}, headers=KEY)
    go_on.set()
    thread.join()
    assert (quick.status_code, REPLAYED in quick.headers) == (202, False)
    assert (slow[0].status_code, slow[0].headers[REPLAYED]) == (202, "true")
    assert slow[0].get_json()["id"] == quick.get_json()["id"]
    assert count(sessions, Job) == before + 1
    assert client.post("/jobs/predict/batch", data={"files": [file(png())]}, headers=KEY).data == quick.data


def test_who_lost_the_lock_writes_nothing(sessions: Sessions) -> None:
    keyed = idempotency.KeyedRequest("default", "a" * 64, "b" * 64)
    with sessions.begin() as session:
        old = idempotency.acquire(session, keyed, hours=24)
    age(sessions, 61)
    with sessions.begin() as session:
        new = idempotency.acquire(session, keyed, hours=24)
    assert isinstance(old, idempotency.Acquired)
    assert isinstance(new, idempotency.Acquired)
    with sessions.begin() as session:
        idempotency.store_response(session, keyed, old, idempotency.StoredResponse(202, {}, "old"))
        idempotency.release(session, keyed, old)
        idempotency.store_response(session, keyed, new, idempotency.StoredResponse(202, {}, "new"))
        told = idempotency.acquire(session, keyed, hours=24)
    assert told == idempotency.StoredResponse(202, {}, "new")


# --- for a day ---


def test_a_key_is_forgotten_after_its_hours(client: FlaskClient, sessions: Sessions) -> None:
    first = client.post("/jobs/train", json=TRAIN, headers=KEY).get_json()
    age(sessions, 23.9 * 3600)
    assert client.post("/jobs/train", json=TRAIN, headers=KEY).get_json()["id"] == first["id"]
    age(sessions, 24.1 * 3600)
    other = client.post("/jobs/train", json={**TRAIN, "name": "next day"}, headers=KEY)
    assert (other.status_code, REPLAYED in other.headers) == (202, False)
    assert other.get_json()["id"] != first["id"]


def test_pruning_forgets_what_is_old_and_frees_it_from_ended_jobs(
    client: FlaskClient, sessions: Sessions, finish: Finish
) -> None:
    first = client.post("/jobs/train", json=TRAIN, headers=KEY).get_json()
    finish(first["id"])
    age(sessions, 25 * 3600)
    client.post("/jobs/train", json=TRAIN, headers={"Idempotency-Key": "fresh"})
    with sessions.begin() as session:
        assert idempotency.prune(session, 24) == 1
        assert idempotency.prune(session, 24) == 0
        job = session.get_one(Job, uuid.UUID(first["id"]))
        assert (job.idempotency_key, job.state) == (None, "succeeded")
        assert len(session.scalars(select(Job.id).where(Job.idempotency_key.is_not(None))).all()) == 1


def test_every_post_that_makes_something_takes_a_key(app: Flask, client: FlaskClient) -> None:
    posts = {rule.endpoint for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    keyed = {endpoint for endpoint in posts if getattr(app.view_functions[endpoint], "idempotent", False)}
    assert posts - keyed == CANCELS
    assert len(keyed) >= 7
    document = client.get("/openapi.json").get_json()
    for path, methods in document["paths"].items():
        names = [parameter["name"] for parameter in methods.get("post", {}).get("parameters", [])]
        makes = "post" in methods and not path.endswith(("/cancel", "/known", "/redeliver"))
        assert ("Idempotency-Key" in names) == makes, path
