"""Uploads in pieces (tus 1.0.0), what a whole one is used for, and which scans need not be sent at all."""

import base64
import datetime as dt
import fcntl
import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from flask.testing import FlaskClient
from sqlalchemy import func, select, update
from werkzeug.http import parse_date
from werkzeug.test import TestResponse

from api.intake import upload_store
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Dataset, IdempotencyKey, Job, ScanResult, Upload
from tests.api.conftest import Door, Server, file, png, zipped
from tests.api.test_errors import UNKNOWN, assert_problem
from tests.applications import application
from tests.processes import eventually

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = "application/offset+octet-stream"
ZIP = zipped({"Normal/1.png": png(), "Tumor/2.png": png(shade=3), "Tumor/broken.png": b"no image"})


def begin(client: FlaskClient, size: int, name: str | None = "kidneys.zip") -> str:
    """The path of a new upload."""
    metadata = {"Upload-Metadata": f"filename {base64.b64encode(name.encode()).decode()}"} if name else {}
    answer = client.post("/uploads", headers={**TUS, "Upload-Length": str(size), **metadata})
    assert answer.status_code == 201, answer.get_data(as_text=True)
    assert answer.get_json()["id"] in answer.headers["Location"]
    return answer.headers["Location"]


def piece(client: FlaskClient, path: str, offset: int, data: bytes, **environ: object) -> TestResponse:
    headers = {**TUS, "Upload-Offset": str(offset)}
    return client.patch(path, data=data, headers=headers, content_type=PIECE, environ_overrides=environ)


def offset_of(client: FlaskClient, path: str) -> int:
    answer = client.head(path, headers=TUS)
    assert answer.status_code == 200
    return int(answer.headers["Upload-Offset"])


def uploaded(client: FlaskClient, content: bytes = ZIP, name: str | None = "kidneys.zip") -> str:
    """The id of a whole upload."""
    path = begin(client, len(content), name)
    assert piece(client, path, 0, content).status_code == 204
    return path.rpartition("/")[2]


def left(sessions: Sessions, settings: Settings) -> tuple[int, int]:
    """Rows and files of uploads that are there."""
    folder = settings.home / "uploads"
    with sessions() as session:
        rows = session.scalar(select(func.count()).select_from(Upload)) or 0
    return rows, len(list(folder.iterdir())) if folder.is_dir() else 0


# --- the protocol ---


def test_the_server_says_what_it_speaks(client: FlaskClient, settings: Settings) -> None:
    answer = client.options("/uploads")
    assert answer.status_code == 204
    assert (answer.headers["Tus-Resumable"], answer.headers["Tus-Version"]) == ("1.0.0", "1.0.0")
    assert set(answer.headers["Tus-Extension"].split(",")) == {"creation", "expiration", "termination"}
    assert answer.headers["Tus-Max-Size"] == str(settings.max_upload_bytes)


def test_an_upload_grows_by_pieces_and_is_given_up(client: FlaskClient, sessions: Sessions, settings: Settings) -> None:
    path = begin(client, 10)
    first = piece(client, path, 0, b"01234")
    assert (first.status_code, first.headers["Upload-Offset"], first.data) == (204, "5", b"")
    asked = client.head(path, headers=TUS)
    assert (asked.headers["Upload-Offset"], asked.headers["Upload-Length"]) == ("5", "10")
    assert asked.headers["Cache-Control"] == "no-store"
    last = piece(client, path, 5, b"56789")
    assert last.headers["Upload-Offset"] == "10"
    for answer in (first, asked, last):
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        expires = parse_date(answer.headers["Upload-Expires"])
        assert expires is not None
        assert dt.timedelta(hours=23) < expires - dt.datetime.now(dt.UTC) <= dt.timedelta(hours=24)
    assert (settings.home / path.lstrip("/")).read_bytes() == b"0123456789"
    gone = client.delete(path, headers=TUS)
    assert (gone.status_code, gone.headers["Tus-Resumable"]) == (204, "1.0.0")
    assert client.head(path, headers=TUS).status_code == 404
    assert left(sessions, settings) == (0, 0)


def test_an_empty_upload_is_whole_at_once(client: FlaskClient) -> None:
    path = begin(client, 0, name=None)
    asked = client.head(path, headers=TUS)
    assert (asked.headers["Upload-Offset"], asked.headers["Upload-Length"]) == ("0", "0")
    assert "Upload-Metadata" not in asked.headers


@pytest.mark.parametrize("version", [{}, {"Tus-Resumable": "0.2.2"}])
def test_another_version_is_412_and_says_which_is_spoken(client: FlaskClient, version: dict[str, str]) -> None:
    answer = client.post("/uploads", headers={"Upload-Length": "1", **version})
    assert "1.0.0" in assert_problem(answer, 412, "TUS_VERSION")["detail"]
    assert (answer.headers["Tus-Version"], answer.headers["Tus-Resumable"]) == ("1.0.0", "1.0.0")


@pytest.mark.parametrize(
    ("headers", "pointer"),
    [
        ({}, "/headers/Upload-Length"),
        ({"Upload-Length": "-1"}, "/headers/Upload-Length"),
        ({"Upload-Length": "1_0"}, "/headers/Upload-Length"),
        ({"Upload-Length": "9" * 30}, "/headers/Upload-Length"),
        ({"Upload-Length": "1", "Upload-Metadata": "filename !"}, "/headers/Upload-Metadata"),
        ({"Upload-Length": "1", "Upload-Metadata": "filename /w=="}, "/headers/Upload-Metadata"),
    ],
)
def test_a_header_that_is_wrong_is_named(client: FlaskClient, headers: dict[str, str], pointer: str) -> None:
    body = assert_problem(client.post("/uploads", headers={**TUS, **headers}), 422)
    assert [error["pointer"] for error in body["errors"]] == [pointer]


def test_the_name_comes_without_folders_and_other_metadata_is_passed_over(client: FlaskClient) -> None:
    name = base64.b64encode("C:\\scans\\Müller\0.zip".encode()).decode()
    metadata = f"filetype YXBw, is_confidential,filename {name}"
    made = client.post("/uploads", headers={**TUS, "Upload-Length": "1", "Upload-Metadata": metadata})
    assert (made.get_json()["name"], made.get_json()["size"]) == ("Müller�.zip", 1)
    shown = client.head(made.headers["Location"], headers=TUS).headers["Upload-Metadata"]
    assert base64.b64decode(shown.removeprefix("filename ")).decode() == "Müller�.zip"


def test_more_than_may_be_uploaded_is_413_before_a_byte_is_sent(settings: Settings, sessions: Sessions) -> None:
    with application(settings.model_copy(update={"max_upload_bytes": 100}), sessions) as app:
        answer = Door(app, sessions).client().post("/uploads", headers={**TUS, "Upload-Length": "101"})
    assert "RENALQ_MAX_UPLOAD_BYTES" in assert_problem(answer, 413, "TOO_LARGE")["detail"]
    assert left(sessions, settings) == (0, 0)


@pytest.mark.parametrize("offset", [0, 4, 6, 10])
def test_a_piece_for_another_place_is_409_and_says_where_to_go_on(client: FlaskClient, offset: int) -> None:
    path = begin(client, 10)
    piece(client, path, 0, b"01234")
    body = assert_problem(piece(client, path, offset, b"x"), 409, "WRONG_OFFSET")
    assert "at 5 of 10 bytes" in body["detail"]
    assert offset_of(client, path) == 5


def test_a_piece_of_another_kind_is_415(client: FlaskClient) -> None:
    answer = client.patch(begin(client, 1), data=b"x", headers={**TUS, "Upload-Offset": "0"}, content_type="text/plain")
    assert PIECE in assert_problem(answer, 415)["detail"]


def test_no_piece_goes_beyond_the_declared_size(client: FlaskClient, settings: Settings) -> None:
    path = begin(client, 4)
    assert_problem(piece(client, path, 0, b"01234"), 413, "TOO_LARGE")
    assert offset_of(client, path) == 0
    chunked = piece(client, path, 0, b"01234", **{"CONTENT_LENGTH": "", "wsgi.input_terminated": True})
    assert chunked.headers["Upload-Offset"] == "4", "of unknown length: the surplus is left"
    assert (settings.home / path.lstrip("/")).read_bytes() == b"0123"


def test_nobody_else_may_see_or_touch_an_upload(client: FlaskClient, stranger: FlaskClient, door: Door) -> None:
    path = begin(client, len(ZIP))
    for answer in (piece(stranger, path, 0, ZIP), stranger.delete(path, headers=TUS)):
        assert_problem(answer, 404)
    assert stranger.head(path, headers=TUS).status_code == 404
    body = {"upload_id": path.rpartition("/")[2]}
    assert_problem(stranger.post("/datasets", json=body), 404)
    assert_problem(door.client("jobs:read").delete(path, headers=TUS), 403)
    assert_problem(piece(client, "/uploads/no-id", 0, b""), 404)
    assert offset_of(client, path) == 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """What another request does while it sends a piece."""
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def test_while_one_request_holds_an_upload_another_is_423(client: FlaskClient, settings: Settings) -> None:
    path = begin(client, len(ZIP))
    with locked(settings.home / path.lstrip("/")):
        use = client.post("/datasets", json={"upload_id": path.rpartition("/")[2]})
        for answer in (piece(client, path, 0, ZIP), client.delete(path, headers=TUS), use):
            assert_problem(answer, 423, "UPLOAD_BUSY")
            assert "Retry-After" in answer.headers
        assert offset_of(client, path) == 0
    assert piece(client, path, 0, ZIP).status_code == 204


def test_a_piece_that_waited_for_a_deletion_finds_nothing(
    client: FlaskClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begin(client, 5)
    flock = fcntl.flock

    def after_the_deletion(file: object, how: int) -> None:
        (settings.home / path.lstrip("/")).unlink()
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(upload_store.fcntl, "flock", after_the_deletion)
    assert_problem(piece(client, path, 0, b"01234"), 404)


# --- what was left lying ---


def age(sessions: Sessions, path: str) -> None:
    """Let a day pass for an upload."""
    with sessions.begin() as session:
        past = func.clock_timestamp() - dt.timedelta(hours=24.1)
        session.execute(update(Upload).where(Upload.id == uuid.UUID(path.rpartition("/")[2])).values(created_at=past))


def test_old_uploads_are_forgotten_when_a_new_one_begins(
    client: FlaskClient, sessions: Sessions, settings: Settings
) -> None:
    young, old, lost, busy = (begin(client, 5) for _ in range(4))
    for path in (old, lost, busy):
        age(sessions, path)
    (settings.home / lost.lstrip("/")).unlink()  # its process died between file and row
    assert client.head(lost, headers=TUS).status_code == 404
    with locked(settings.home / busy.lstrip("/")):
        begin(client, 5)
    assert left(sessions, settings) == (3, 3)
    assert client.head(old, headers=TUS).status_code == 404
    assert (offset_of(client, young), offset_of(client, busy)) == (0, 0)
    begin(client, 5)
    assert client.head(busy, headers=TUS).status_code == 404


# --- what a whole one is for ---


def dataset_of(sessions: Sessions, dataset_id: str) -> tuple[str, str, int]:
    with sessions() as session:
        row = session.get_one(Dataset, uuid.UUID(dataset_id))
        return row.name, row.archive_sha256, row.archive_bytes


def results_of(sessions: Sessions, job_id: str) -> list[tuple[object, ...]]:
    with sessions() as session:
        rows = session.scalars(select(ScanResult).where(ScanResult.job_id == uuid.UUID(job_id)))
        return sorted((row.ordinal, row.name, row.state, str(row.scan_id)) for row in rows)


@pytest.mark.parametrize("cut", [0, 1, len(ZIP) // 2, len(ZIP) - 1])
def test_cut_anywhere_it_makes_the_same_as_one_call(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: object, cut: int
) -> None:
    ids = []
    for _ in range(2):
        path = begin(client, len(ZIP))
        piece(client, path, 0, ZIP[:cut])
        assert offset_of(client, path) == cut
        piece(client, path, cut, ZIP[cut:])
        ids.append(path.rpartition("/")[2])
    dataset = client.post("/datasets", json={"upload_id": ids[0]})
    assert dataset.status_code == 202, dataset.get_json()
    once = client.post("/datasets", data={"file": file(ZIP, "kidneys.zip")}).get_json()
    assert dataset_of(sessions, dataset.get_json()["id"]) == dataset_of(sessions, once["id"])
    job = client.post("/jobs/predict/batch", json={"upload_id": ids[1]})
    assert job.status_code == 202, job.get_json()
    once = client.post("/jobs/predict/batch", data={"files": [file(ZIP, "kidneys.zip")]}).get_json()
    assert results_of(sessions, job.get_json()["id"]) == results_of(sessions, once["id"])
    assert len(results_of(sessions, once["id"])) == 3
    assert left(sessions, settings) == (0, 0), "used up"


def test_a_single_scan_is_a_batch_of_one(client: FlaskClient, sessions: Sessions, champion: object) -> None:
    job = client.post("/jobs/predict/batch", json={"upload_id": uploaded(client, png(), "one.png")}).get_json()
    ((_, name, state, _),) = results_of(sessions, job["id"])
    assert (name, state) == ("one.png", "pending")


def test_a_dataset_takes_the_name_that_is_given(client: FlaskClient) -> None:
    body = {"upload_id": uploaded(client), "name": "mine"}
    assert client.post("/datasets", json=body).get_json()["name"] == "mine"
    assert client.post("/datasets", json={"upload_id": uploaded(client, name=None)}).get_json()["name"] == "dataset"


def test_an_incomplete_one_is_409_and_says_how_to_go_on(client: FlaskClient, champion: object) -> None:
    path = begin(client, len(ZIP))
    piece(client, path, 0, ZIP[:7])
    body = {"upload_id": path.rpartition("/")[2]}
    for use in ("/datasets", "/jobs/predict/batch"):
        detail = assert_problem(client.post(use, json=body), 409, "UPLOAD_INCOMPLETE")["detail"]
        assert f"7 of the upload's {len(ZIP)} bytes" in detail
        assert f"PATCH {path}" in detail
    piece(client, path, 7, ZIP[7:])
    assert client.post("/datasets", json=body).status_code == 202


def test_one_that_is_refused_is_kept_and_one_that_was_used_is_gone(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: object
) -> None:
    bad = uploaded(client, b"no zip")
    assert_problem(client.post("/datasets", json={"upload_id": bad}), 422, "BAD_ARCHIVE")
    assert left(sessions, settings) == (1, 1)
    good = uploaded(client)
    assert client.post("/jobs/predict/batch", json={"upload_id": good}).status_code == 202
    assert_problem(client.post("/jobs/predict/batch", json={"upload_id": good}), 404)
    assert_problem(client.post("/datasets", json={"upload_id": UNKNOWN}), 404)
    assert left(sessions, settings) == (1, 1)


@pytest.mark.parametrize("body", [{}, {"scan_ids": [UNKNOWN]}, {"dataset_id": UNKNOWN}, {"custom_ids": ["a"]}])
def test_an_upload_stands_for_all_scans_of_a_batch(client: FlaskClient, body: dict[str, object]) -> None:
    given = {"upload_id": UNKNOWN, **body} if body else {}
    assert_problem(client.post("/jobs/predict/batch", json=given), 422)


@pytest.mark.parametrize("use", ["/datasets", "/jobs/predict/batch"])
def test_one_key_uses_an_upload_once_and_gets_the_first_answer_again(
    client: FlaskClient, sessions: Sessions, champion: object, use: str
) -> None:
    body, key = {"upload_id": uploaded(client)}, {"Idempotency-Key": "order-4711"}
    first = client.post(use, json=body, headers=key)
    again = client.post(use, json=body, headers=key)
    assert (first.status_code, again.data, again.headers["Idempotency-Replayed"]) == (202, first.data, "true")
    with sessions.begin() as session:  # as if the process had died between its commit and its answer
        past = func.clock_timestamp() - dt.timedelta(seconds=61)
        session.execute(update(IdempotencyKey).values(status=None, headers=None, body=None, locked_at=past))
    assert client.post(use, json=body, headers=key).get_json()["id"] == first.get_json()["id"]
    other = {"upload_id": uploaded(client)}
    assert_problem(client.post(use, json=other, headers=key), 422, "IDEMPOTENCY_KEY_REUSED")
    with sessions() as session:
        assert session.scalar(select(func.count()).where(Job.kind.in_(["ingest", "predict_batch"]))) == 1


def test_a_key_that_came_too_early_goes_on_once_the_upload_is_whole(client: FlaskClient, champion: object) -> None:
    path, key = begin(client, len(ZIP)), {"Idempotency-Key": "early"}
    body = {"upload_id": path.rpartition("/")[2]}
    assert_problem(client.post("/jobs/predict/batch", json=body, headers=key), 409, "UPLOAD_INCOMPLETE")
    piece(client, path, 0, ZIP)
    assert client.post("/jobs/predict/batch", json=body, headers=key).status_code == 202


def test_a_repeated_beginning_makes_one_upload(client: FlaskClient, sessions: Sessions, settings: Settings) -> None:
    headers = {**TUS, "Upload-Length": "5", "Idempotency-Key": "one"}
    first, again = (client.post("/uploads", headers=headers) for _ in range(2))
    assert first.headers["Location"] == again.headers["Location"]
    assert left(sessions, settings) == (1, 1)


# --- which scans are stored ---


def test_only_what_is_not_stored_need_be_sent(client: FlaskClient, stranger: FlaskClient, champion: object) -> None:
    mine, theirs, nobodys = (png(shade=shade) for shade in (1, 2, 3))
    scan_id = client.post("/scans", data={"file": file(mine)}).get_json()["id"]
    stranger.post("/scans", data={"file": file(theirs)})
    hashes = [hashlib.sha256(content).hexdigest() for content in (mine, theirs, nobodys)]
    answer = client.post("/scans/known", json={"sha256": hashes})
    assert (answer.status_code, answer.get_json()) == (200, {"data": {hashes[0]: scan_id}})
    body = {"scan_ids": list(answer.get_json()["data"].values())}
    assert client.post("/jobs/predict/batch", json=body).status_code == 202


def test_ten_thousand_hashes_are_asked_for_at_once_and_no_more(client: FlaskClient) -> None:
    hashes = [f"{number:064x}" for number in range(10_001)]
    assert client.post("/scans/known", json={"sha256": hashes[1:]}).get_json() == {"data": {}}
    assert client.post("/scans/known", json={"sha256": []}).get_json() == {"data": {}}
    assert_problem(client.post("/scans/known", json={"sha256": hashes}), 422)
    body = assert_problem(client.post("/scans/known", json={"sha256": ["f" * 64, "F" * 64]}), 422)
    assert body["errors"][0]["pointer"] == "/sha256/1"
    assert_problem(client.get("/scans/known"), 405)


# --- a real connection that breaks ---


@pytest.mark.slow
def test_a_connection_that_breaks_keeps_what_arrived_and_the_rest_is_sent(
    server: Server, door: Door, settings: Settings, sessions: Sessions
) -> None:
    content = zipped({f"{word}/{n}.bin": os.urandom(50_000) for word in ("A", "B") for n in range(20)})
    key = door.client().environ_base["HTTP_AUTHORIZATION"]
    api = requests.Session()
    api.headers.update({**TUS, "Authorization": key})
    path = api.post(f"{server.url}/uploads", headers={"Upload-Length": str(len(content))}).headers["Location"]
    at, breaks = 0, 0
    while at < len(content):
        head = f"PATCH {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nTus-Resumable: 1.0.0\r\n"
        head += f"Content-Type: {PIECE}\r\nUpload-Offset: {at}\r\nContent-Length: {len(content) - at}\r\n\r\n"
        sent = content[at : at + 700_001]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + sent)
        breaks += 1
        whole = at + len(sent)
        eventually(lambda: int(api.head(server.url + path).headers["Upload-Offset"]) == whole, 10)  # noqa: B023
        at = whole
    assert breaks == 3
    dataset = api.post(f"{server.url}/datasets", json={"upload_id": path.rpartition("/")[2]})
    assert dataset.status_code == 202, dataset.text
    assert dataset_of(sessions, dataset.json()["id"])[1] == hashlib.sha256(content).hexdigest()
    assert left(sessions, settings) == (0, 0)
