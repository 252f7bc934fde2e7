"""One error shape, whatever goes wrong and wherever."""

import io
import json
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api import create_app
from api.http.auth import public
from api.http.body.spool import SCAN_JSON_BYTES
from jobs.db import Sessions
from jobs.error_codes import ERROR_CODES
from jobs.settings import Settings
from tests.api.conftest import Door, file, png, zipped
from tests.applications import application
from tests.private_logs import service_logs

UNKNOWN = "01a1fee2-02aa-7524-a44d-7ccf93fff0eb"


def assert_problem(answer: TestResponse, status: int, code: str | None = None) -> dict:
    """The answer is a problem of this status, whole and without a trace of our insides."""
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert answer.mimetype == "application/problem+json"
    body = answer.get_json()
    assert {"type", "title", "status", "detail", "instance", "code", "request_id"} <= set(body)
    assert body["status"] == status
    assert body["request_id"] == answer.headers["X-Request-Id"]
    assert "Traceback" not in answer.get_data(as_text=True)
    assert code in (None, body["code"])
    return body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing/here", 404),
        ("GET", f"/jobs/{UNKNOWN}", 404),
        ("GET", "/jobs/not-an-id", 404),
        ("GET", f"/jobs/{UNKNOWN}/nothing", 404),
        ("GET", f"/datasets/{UNKNOWN}", 404),
        ("GET", f"/scans/{UNKNOWN}", 404),
        ("GET", "/models/7", 404),
        ("GET", "/models/champion", 404),
        ("GET", "/models/99999999999999999999", 404),
        ("DELETE", f"/keys/{UNKNOWN}", 404),
        ("GET", "/docs/../../etc/passwd", 404),
        ("DELETE", "/jobs", 405),
        ("PUT", f"/jobs/{UNKNOWN}", 405),
        ("GET", "/jobs/train", 405),
        ("GET", f"/jobs/{UNKNOWN}/cancel", 405),
        ("POST", "/health/live", 405),
        ("GET", "/jobs?limit=0", 422),
        ("GET", "/jobs?limit=101", 422),
        ("GET", "/jobs?limit=ten", 422),
        ("GET", "/jobs?colour=red", 422),
        ("GET", "/jobs?state=tired", 422),
        ("GET", "/jobs?after=x", 422),
        ("GET", "/jobs?created_after=0001-01-01T00:00:00%2B10:00", 422),
        ("GET", "/jobs?metadata[a]=%00", 422),
        ("GET", f"/jobs/{UNKNOWN}/events?after=99999999999999999999", 422),
    ],
)
def test_every_refusal_has_the_one_shape(client: FlaskClient, method: str, path: str, status: int) -> None:
    assert_problem(client.open(path, method=method), status)


def test_a_refused_method_says_which_are_allowed(client: FlaskClient) -> None:
    assert "GET" in client.delete("/jobs").headers["Allow"]
    assert set(client.get("/jobs/predict").headers["Allow"].split(", ")) == {"POST", "OPTIONS"}


def test_an_ill_formed_id_answers_like_an_unknown_one(client: FlaskClient) -> None:
    def told(path: str) -> dict:
        body = client.get(path).get_json()
        return {key: value for key, value in body.items() if key not in ("instance", "request_id")}

    assert told("/jobs/not-an-id") == told(f"/jobs/{UNKNOWN}")


@pytest.mark.parametrize("given", ["", "Basic abc", "Bearer", "Bearer rq_wrong", "Bearer \u00ff"])
def test_a_bad_key_is_401_and_says_how_to_send_one(app: Flask, given: str) -> None:
    answer = app.test_client().get("/jobs", headers={"Authorization": given.encode("latin-1").decode("latin-1")})
    assert_problem(answer, 401, "UNAUTHORIZED")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_revoked_key_is_401_at_once(client: FlaskClient) -> None:
    made = client.post("/keys", json={"name": "short", "scopes": ["jobs:read"]}).get_json()
    bearer = {"Authorization": f"Bearer {made['secret']}"}
    assert client.get("/jobs", headers=bearer).status_code == 200
    revoked = client.delete(f"/keys/{made['id']}")
    assert (revoked.status_code, revoked.data, "Content-Type" in revoked.headers) == (204, b"", False)
    assert_problem(client.get("/jobs", headers=bearer), 401)


def test_a_missing_scope_is_403_and_named(door: Door) -> None:
    reader = door.client("jobs:read")
    assert "jobs:write" in assert_problem(reader.post("/jobs/train", json={}), 403, "SCOPE_MISSING")["detail"]
    assert_problem(reader.get("/keys"), 403)
    assert_problem(door.client("jobs:write").get("/jobs"), 403)


def test_fields_are_named_by_pointers(client: FlaskClient) -> None:
    body = {"params": {"epochs": "2", "xyz": 1, "image_size": [224, 224, 4]}, "source_url": "ftp://x", "colour": "red"}
    problem = assert_problem(client.post("/jobs/train", json=body), 422)
    pointers = {error["pointer"] for error in problem["errors"]}
    assert {"/params/epochs", "/params/xyz", "/params/image_size", "/source_url", "/colour"} <= pointers


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"[]", ""),
        (b"[" * 100_000, ""),
        (b"[" * 700 + b"]" * 700, ""),
        (b'{"source_url": "http://x/\\u0000"}', "/source_url"),
        (b'{"source_url": "http://x/", "metadata": {"a": "\\ud800"}}', "/metadata/a"),
        (b'{"source_url": "http://x/", "metadata": {"a": 1e999}}', "/metadata/a"),
        (b'{"source_url": "http://x/", "metadata": {"a": {"b": 1}}}', "/metadata/a"),
        (b'{"source_url": "http://x/", "dataset_id": "01a1fa6e-f03d-7721-8a01-cea4209be2a8"}', "/source_url"),
        (b"{}", "/dataset_id"),
        (b"", "/dataset_id"),
    ],
)
def test_a_body_that_cannot_be_kept_is_422(client: FlaskClient, body: bytes, pointer: str) -> None:
    problem = assert_problem(client.post("/jobs/train", data=body, content_type="application/json"), 422)
    assert pointer in {error["pointer"] for error in problem["errors"]}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"{", "line 1, column 2"),
        (b'{"name":\n  Canary}', "line 2, column 3"),
        (b'{"name": "Canary\\x"}', "line 1, column 17"),
        (b'{"name": NaN}', "NaN"),
        (b'{"name": "\xff"}', "byte 11"),
    ],
)
def test_malformed_json_is_400_and_tells_where_but_not_what(client: FlaskClient, body: bytes, place: str) -> None:
    answer = client.post("/jobs/train", data=body, content_type="application/json")
    problem = assert_problem(answer, 400, "MALFORMED_BODY")
    assert place in problem["detail"]
    assert "Canary" not in json.dumps(problem)


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nCanary'


@pytest.mark.parametrize(
    ("body", "boundary"),
    [(PART, "; boundary=x"), (PART + b"\r\n--x--\r\n", ""), (b"--x\r\n\r\nCanary\r\n--x--\r\n", "; boundary=x")],
    ids=["cut off", "no boundary", "a part without a name"],
)
def test_malformed_multipart_is_400(client: FlaskClient, body: bytes, boundary: str) -> None:
    answer = client.post("/jobs/predict", data=body, content_type=f"multipart/form-data{boundary}")
    assert "Canary" not in json.dumps(assert_problem(answer, 400, "MALFORMED_BODY"))


@pytest.mark.parametrize(
    ("path", "headers", "field"),
    [
        ("/jobs/train", {}, {"pointer": "/colour", "in": "body"}),
        ("/jobs?limit=0", {}, {"pointer": "/query/limit", "in": "query"}),
        ("/jobs/train", {"Idempotency-Key": "\u00e9"}, {"pointer": "/Idempotency-Key", "in": "header"}),
        ("/uploads", {"Tus-Resumable": "1.0.0"}, {"pointer": "/headers/Upload-Length", "in": "header"}),
        ("/jobs/predict/batch?lane=slow", {"Content-Type": "text/csv"}, {"pointer": "/lane", "in": "query"}),
    ],
)
def test_a_wrong_field_tells_where_it_is(client: FlaskClient, path: str, headers: dict, field: dict) -> None:
    body = {"source_url": "http://x/"} | ({} if "Idempotency-Key" in headers else {"colour": 1})
    method = "GET" if "limit" in path else "POST"
    headers = {"Content-Type": "application/json"} | headers
    problem = assert_problem(client.open(path, method=method, data=json.dumps(body), headers=headers), 422)
    assert field in [{"pointer": error["pointer"], "in": error["in"]} for error in problem["errors"]]


def test_the_type_leads_to_the_code_and_the_title_is_the_codes_own(client: FlaskClient, app: Flask) -> None:
    one = assert_problem(client.get("/jobs?limit=0"), 422, "INVALID")
    other = assert_problem(client.post("/v1/keys", json={}), 422, "INVALID")
    assert (one["type"], one["title"]) == (other["type"], other["title"])
    assert one["instance"].endswith(one["request_id"]) != other["instance"]
    told = app.test_client().get(one["type"]).get_json()
    assert {name: told[name] for name in ("code", "title", "status")} == {
        name: one[name] for name in ("code", "title", "status")
    }


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_every_code_has_a_page(app: Flask, prefix: str) -> None:
    anybody = app.test_client()
    for code, known in ERROR_CODES.items():
        assert anybody.get(f"{prefix}/problems/{code}").get_json() == vars(known)
        page = anybody.get(f"{prefix}/problems/{code}", headers={"Accept": "text/html"})
        assert (page.status_code, page.mimetype) == (200, "text/html")
        assert code in page.get_data(as_text=True)
    assert_problem(anybody.get(f"{prefix}/problems/NOTHING"), 404)


def test_another_kind_of_body_is_415(client: FlaskClient) -> None:
    assert_problem(client.post("/jobs/train", data="a=b", content_type="text/plain"), 415)
    assert_problem(client.post("/jobs/train", data={"file": file(png())}), 415)
    assert_problem(client.post("/datasets", data="a=b", content_type="text/plain"), 415)


def test_a_body_that_is_too_large_is_413_and_names_the_setting(settings: Settings, sessions: Sessions) -> None:
    with application(settings.model_copy(update={"max_upload_bytes": 1000}), sessions) as app:
        client = Door(app, sessions).client()
        answer = client.post("/scans", data={"file": file(bytes(2000))})
        assert "RENALQ_MAX_UPLOAD_BYTES" in assert_problem(answer, 413, "TOO_LARGE")["detail"]
        answer = client.post("/jobs/train", json={"name": "x" * 2000})
        assert_problem(answer, 413, "TOO_LARGE")


def test_json_that_is_too_large_is_413_and_names_the_way_and_no_setting(client: FlaskClient) -> None:
    answer = client.post("/predict", data=bytes(SCAN_JSON_BYTES + 1), content_type="application/json")
    detail = assert_problem(answer, 413, "TOO_LARGE")["detail"]
    assert "multipart" in detail
    assert str(SCAN_JSON_BYTES) in detail
    assert "RENALQ_" not in detail


def test_a_scan_that_is_too_large_is_413(settings: Settings, sessions: Sessions) -> None:
    with application(settings.model_copy(update={"max_scan_bytes": 10}), sessions) as app:
        assert_problem(Door(app, sessions).client().post("/scans", data={"file": file(png())}), 413)


def test_a_defect_of_ours_is_500_and_tells_nobody_what_it_was_about(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    app = create_app(settings)
    with service_logs():

        @public
        def broken() -> None:
            raise RuntimeError("patient Canary^Name")

        app.add_url_rule("/broken", "broken", broken)
        answer = app.test_client().get("/broken?name=Canary")
        body = assert_problem(answer, 500, "INTERNAL")
        assert "Canary" not in json.dumps(body)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert "Canary" not in json.dumps(lines)
    assert any(line.get("error") == "RuntimeError" for line in lines)


def test_without_postgres_the_answer_is_503_and_the_process_still_lives(tmp_path: Path) -> None:
    away = Settings(home=tmp_path, database_url="postgresql+psycopg2://nobody@127.0.0.1:1/none")
    with application(away) as app:
        client = app.test_client()
        answer = client.get("/jobs", headers={"Authorization": "Bearer rq_x"})
        assert_problem(answer, 503)
        assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert "database" in assert_problem(ready, 503)["reasons"][0]


def test_names_and_labels_of_clients_are_in_no_log(
    client: FlaskClient, champion: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with service_logs("api", "DEBUG"):
        archive = zipped({"Normal/Canary^Patient.png": png()})
        client.post("/datasets", data={"file": file(archive, "Canary.zip"), "name": "Canary"})
        client.post("/jobs/predict", data={"file": file(png(), "Canary\r\nset.png"), "metadata": '{"p": "Canary"}'})
        client.post("/jobs/predict", data={"file": file(b"Canary", "Canary.png")})
        client.get("/jobs?metadata[p]=Canary")
        client.get("/Canary", headers={"X-Request-Id": "Canary\x1b[31m"})
        logged = capsys.readouterr()
    lines = [json.loads(line) for line in logged.err.splitlines()]
    assert len([line for line in lines if line["event"] == "request"]) == 5
    assert "Canary" not in logged.err + logged.out


def test_a_client_may_bring_its_own_request_id(client: FlaskClient) -> None:
    assert client.get("/jobs", headers={"X-Request-Id": "trace-12345"}).headers["X-Request-Id"] == "trace-12345"
    assert client.get("/jobs", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"] != "a b"


def test_ten_thousand_parts_need_no_memory_and_one_descriptor(settings: Settings) -> None:
    from api.http.body.spool import Spool

    spool = Spool(settings.home / "incoming")
    for number in range(1000):
        section = spool.section()
        section.write(b"%04d" % number)
        section.seek(0)
    assert [io.BufferedReader(section).read() for section in spool._sections[:2]] == [b"0000", b"0001"]
    assert spool._sections[999].read() == b"0999"
    assert list((settings.home / "incoming").iterdir()) == []
    spool.close()
