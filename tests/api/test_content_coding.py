"""`Content-Encoding` of a request: gzip and deflate are decoded, never beyond the limit; others are refused."""

import gzip
import io
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from flask.testing import FlaskClient

from api.http.body.content_coding import BLOCK, Received, body_stream
from api.http.body.spool import JSON_BYTES
from jobs.db import Sessions
from jobs.errors import MalformedBody
from jobs.settings import Settings
from tests.api.conftest import Door, png
from tests.api.test_errors import assert_problem
from tests.api.test_multipart import END, TYPE, file
from tests.applications import application

BODY = json.dumps({"sha256": ["a" * 64] * 3000}).encode()
"""More than one block."""


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def incompressible(data: bytes) -> bytes:
    """gzip that stores its content."""
    return gzip.compress(data, 0)


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip, capitals and spaces": (" GZip ", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "gzip, stored": ("gzip", incompressible),
    "gzip, two members": ("gzip", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
    "gzip, zeros at the end": ("gzip", lambda data: gzip.compress(data) + bytes(100_000)),
    "gzip, an empty member": ("gzip", lambda data: gzip.compress(b"") + gzip.compress(data)),
    "deflate": ("deflate", zlib.compress),
    "deflate without zlib's header": ("deflate", raw_deflate),
    "identity": ("identity", bytes),
    "empty": ("", bytes),
}


@pytest.mark.parametrize("what", CODINGS)
def test_a_coded_body_is_decoded(client: FlaskClient, what: str) -> None:
    coding, encode = CODINGS[what]
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    answer = client.post("/scans/known", data=encode(BODY), headers=headers)
    assert (answer.status_code, answer.get_json()) == (200, {"data": {}})
    answer = client.post("/scans", data=encode(file() + END), headers={**headers, "Content-Type": TYPE})
    assert answer.status_code == 201, answer.get_json()
    answer = client.post(
        "/jobs/predict/batch", data=encode(b"file,scan_id\n,x\n"), headers={**headers, "Content-Type": "text/csv"}
    )
    assert "/manifest/2/scan_id" in {one["pointer"] for one in assert_problem(answer, 422)["errors"]}


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, deflate", "Canary"])
def test_another_coding_is_415_and_says_which_are_taken(client: FlaskClient, coding: str) -> None:
    answer = client.post("/scans", data=b"Canary", headers={"Content-Encoding": coding, "Content-Type": TYPE})
    problem = assert_problem(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"
    assert "gzip, deflate" in problem["detail"]
    assert "Canary" not in json.dumps(problem)


def test_another_media_type_is_no_question_of_its_coding(client: FlaskClient) -> None:
    answer = client.post("/scans", data=b"a", content_type="text/plain")
    assert_problem(answer, 415)
    assert "Accept-Encoding" not in answer.headers


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "not gzip": ("gzip", BODY, "not gzip.*leave that header out"),
    "cut off": ("gzip", gzip.compress(BODY)[:-9], "cut off"),
    "cut off after its data": ("gzip", gzip.compress(BODY)[:-4], "cut off"),
    "cut off in its header": ("gzip", gzip.compress(BODY)[:5], "cut off"),
    "other checksum": ("gzip", gzip.compress(BODY)[:-8] + bytes(8), "damaged"),
    "damaged": ("gzip", gzip.compress(BODY)[:20] + b"\xff\xff\xff" + gzip.compress(BODY)[23:], "damaged|cut off"),
    "bytes behind": ("gzip", gzip.compress(BODY) + b"Canary", "Bytes follow"),
    "no deflate": ("deflate", b"Canary", "damaged"),
    "deflate cut off": ("deflate", zlib.compress(BODY)[:-5], "cut off"),
    "deflate and more": ("deflate", zlib.compress(BODY) * 2, "Bytes follow"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_coding_is_400_and_says_so(client: FlaskClient, what: str) -> None:
    coding, body, why = DAMAGED[what]
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    problem = assert_problem(client.post("/scans/known", data=body, headers=headers), 400, "MALFORMED_BODY")
    assert pytest.raises(AssertionError, match=why).matches(AssertionError(problem["detail"]))
    assert "Canary" not in json.dumps(problem)


def test_an_empty_body_is_empty_in_any_coding(client: FlaskClient) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    problem = assert_problem(client.post("/scans/known", data=b"", headers=headers), 422)
    assert problem["errors"][0]["pointer"] == "/sha256"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("content_type", ["application/json", TYPE, "text/csv"])
def test_what_decodes_to_too_much_is_cut_off_in_time(
    settings: Settings, sessions: Sessions, coding: str, content_type: str
) -> None:
    bomb = file(content=bytes(64 * 1024 * 1024)) if content_type == TYPE else bytes(64 * 1024 * 1024)
    body = {"gzip": gzip.compress, "deflate": zlib.compress}[coding](bomb)
    assert len(body) < 100_000
    limit = 1_000_000
    with application(settings.model_copy(update={"max_upload_bytes": limit}), sessions) as app:
        client = Door(app, sessions).client()
        tracemalloc.start()
        answer = client.post(
            "/jobs/predict/batch",
            data=body,
            headers={"Content-Encoding": coding, "Content-Type": content_type},
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(limit) in assert_problem(answer, 413, "TOO_LARGE")["detail"]
        assert peak < 8 * limit
        assert list((settings.home / "incoming").glob("*")) == []


def test_json_has_its_own_limit_after_decoding(client: FlaskClient) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    answer = client.post("/scans/known", data=gzip.compress(b" " * (JSON_BYTES + 1)), headers=headers)
    assert str(JSON_BYTES) in assert_problem(answer, 413, "TOO_LARGE")["detail"]
    answer = client.post("/scans/known", data=gzip.compress(b"{}" + b" " * (JSON_BYTES - 2)), headers=headers)
    assert_problem(answer, 422)


def test_a_coded_chunk_of_an_upload_counts_decoded(client: FlaskClient) -> None:
    content = png()
    tus = {"Tus-Resumable": "1.0.0"}
    path = client.post("/uploads", headers={**tus, "Upload-Length": str(len(content))}).headers["Location"]
    headers = {**tus, "Upload-Offset": "0", "Content-Encoding": "gzip"}
    answer = client.patch(
        path, data=gzip.compress(content, 0), headers=headers, content_type="application/offset+octet-stream"
    )
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(len(content)))


def test_of_a_coded_chunk_that_is_cut_off_the_decoded_bytes_are_kept(client: FlaskClient) -> None:
    content = os.urandom(200_000)
    tus = {"Tus-Resumable": "1.0.0"}
    path = client.post("/uploads", headers={**tus, "Upload-Length": str(len(content))}).headers["Location"]
    headers = {**tus, "Upload-Offset": "0", "Content-Encoding": "gzip"}
    media_type = "application/offset+octet-stream"
    cut = client.patch(path, data=gzip.compress(content)[:150_000], headers=headers, content_type=media_type)
    assert "cut off" in assert_problem(cut, 400, "MALFORMED_BODY")["detail"]
    offset = client.head(path, headers=tus).headers["Upload-Offset"]
    assert 100_000 < int(offset) < 150_000
    rest = gzip.compress(content[int(offset) :])
    answer = client.patch(path, data=rest, headers={**headers, "Upload-Offset": offset}, content_type=media_type)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(len(content)))


def test_a_repeated_request_may_be_coded_otherwise(client: FlaskClient, champion: object) -> None:
    headers = {"Idempotency-Key": "once", "Content-Type": TYPE}
    first = client.post("/jobs/predict", data=file() + END, headers=headers)
    again = client.post(
        "/jobs/predict", data=gzip.compress(file() + END), headers={**headers, "Content-Encoding": "gzip"}
    )
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json()["id"] == first.get_json()["id"]


# --- the stream ---


@pytest.mark.parametrize("size", [0, 99, 100])
@pytest.mark.parametrize("length", [None, "its own"])
@pytest.mark.parametrize("coding", [None, "gzip"])
def test_as_many_bytes_as_the_limit_are_taken(size: int, length: str | None, coding: str | None) -> None:
    sent = gzip.compress(bytes(size), mtime=0) if coding else bytes(size)
    stream = body_stream(
        io.BytesIO(sent + b"next request"[: 0 if length is None else 12]), length and len(sent), coding, 100
    )
    assert stream.read() == bytes(size)


@pytest.mark.parametrize("size", [*range(BLOCK - 60, BLOCK + 2)])
def test_a_member_may_end_where_a_block_ends(size: int) -> None:
    sent = gzip.compress(bytes(size), 0, mtime=0) + gzip.compress(b"end", mtime=0)
    assert body_stream(io.BytesIO(sent), len(sent), "gzip", None).read() == bytes(size) + b"end"


class Broken(io.BytesIO):
    """A connection that breaks off, as servers report it."""

    def read(self, size: int | None = -1) -> bytes:
        if data := super().read(size):
            return data
        raise OSError


@pytest.mark.parametrize(("stream", "length"), [(io.BytesIO, 9), (Broken, 9), (Broken, None)])
def test_a_body_that_ends_too_soon_is_no_shorter_body(stream: type[io.BytesIO], length: int | None) -> None:
    received = Received(stream(b"1234"), length, None)
    assert received.read(100) == b"1234"
    with pytest.raises(MalformedBody, match="cut off on its way: 4 of 9" if length else "chunks"):
        received.read(100)
