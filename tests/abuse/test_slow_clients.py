"""Clients that are slow, silent or deaf hold up nobody; slow ones that are honest get through."""

import socket
import time
from importlib.resources import files

import pytest

from jobs.db import Sessions
from tests import builders
from tests.abuse.conftest import SHORT, Start, answer_of, asked, connected, crowd, head, read, timed
from tests.abuse.slow_clients import ATTACKS
from tests.api.conftest import Door, Server
from tests.api.test_multipart import END, TYPE, file
from tests.processes import eventually

pytestmark = pytest.mark.slow

HALF = head("GET /health/live")[:-2] + b"X-Long: a"
KNOWN = ("POST /scans/known", "Content-Type: application/json")


@pytest.fixture
def key(door: Door) -> str:
    """The header with a key."""
    return f"Authorization: {door.client().environ_base['HTTP_AUTHORIZATION']}"


@pytest.mark.parametrize(
    ("number", "sent", "buffer"),
    [
        pytest.param(1000, HALF, None, id="half heads"),
        pytest.param(1100, b"", None, id="silent"),
        pytest.param(300, head("POST /scans", "Content-Type: text/csv", "Content-Length: 999"), None, id="no key"),
        pytest.param(300, head("GET /docs/swagger-ui-bundle.js"), 2048, id="deaf to a file"),
        pytest.param(300, head("GET /openapi.json"), 2048, id="deaf to a document"),
        pytest.param(100, head("GET /health/live", "Connection: close"), None, id="never closing"),
    ],
)
def test_honest_requests_are_answered_within_a_second(
    start: Start, key: str, number: int, sent: bytes, buffer: int | None
) -> None:
    server = start()
    with crowd(server, number, sent, buffer):
        settled(server)
        times = [timed(server, path, key) for _ in range(5) for path in ("/health/live", "/jobs")]
    assert max(times) < 1, times


@pytest.mark.parametrize("begun", [b"", b'{"sha256":'], ids=["silent", "begun"])
def test_bodies_that_do_not_come_give_their_threads_to_others(start: Start, key: str, begun: bytes) -> None:
    server = start()  # their time is not over before the end of this test
    with crowd(server, 300, head(*KNOWN, key, "Content-Length: 1000") + begun):
        settled(server)
        assert max(timed(server, "/jobs", key) for _ in range(10)) < 1


def settled(server: Server) -> None:
    """Wait until the requests that came with the crowd are being answered, as far as they will be."""
    time.sleep(1)  # the first second of a request does not count
    eventually(lambda: timed(server, "/health/live") < 0.5, 10)


def test_a_head_that_does_not_come_is_408(start: Start) -> None:
    server = start(**SHORT)
    with connected(server) as silent, connected(server, HALF) as half:
        began = time.monotonic()
        answer_of(read(half)).problem(408, "TOO_SLOW")
        assert 0.9 < time.monotonic() - began < 4
        assert read(silent) == b""


def test_a_head_in_pieces_has_one_time_for_all(start: Start) -> None:
    server = start(**SHORT)
    with connected(server, head("GET /health/live")) as kept:
        assert b"live" in kept.recv(4096)
        for byte in HALF[:12]:
            kept.sendall(bytes([byte]))
            time.sleep(0.1)
        answer_of(read(kept)).problem(408, "TOO_SLOW")


@pytest.mark.parametrize("pieces", [0, 9], ids=["silent", "a byte now and then"])
def test_a_body_that_does_not_come_is_408(start: Start, key: str, pieces: int) -> None:
    server = start(**SHORT)
    with connected(server, head(*KNOWN, key, "Connection: close", "Content-Length: 100")) as connection:
        began = time.monotonic()
        for _ in range(pieces):
            connection.sendall(b" ")
            time.sleep(0.2)
        answer_of(read(connection)).problem(408, "TOO_SLOW")
        assert time.monotonic() - began < 4


def test_a_slow_body_that_keeps_its_pace_is_taken(start: Start, key: str) -> None:
    server = start(**SHORT)
    body = b'{"sha256": []}' + 4000 * b" "
    with connected(server, head(*KNOWN, key, "Connection: close", f"Content-Length: {len(body)}")) as connection:
        for at in range(0, len(body), 200):
            connection.sendall(body[at : at + 200])
            time.sleep(0.2)
        assert answer_of(read(connection)).status == 200


def test_an_upload_that_fell_silent_is_unlocked_and_keeps_its_bytes(start: Start, key: str) -> None:
    server = start(**SHORT)
    tus = (key, "Tus-Resumable: 1.0.0", "Connection: close")
    made = asked(server, head("POST /uploads", *tus, "Upload-Length: 200000"))
    path = next(line.split()[1] for line in made.head.splitlines() if line.startswith("Location:"))
    piece = ("Upload-Offset: 0", "Content-Type: application/offset+octet-stream", "Content-Length: 200000")
    with connected(server, head(f"PATCH {path}", *tus, *piece), bytes(65536)) as connection:
        assert asked(server, head(f"DELETE {path}", *tus)).status == 423
        answer_of(read(connection)).problem(408, "TOO_SLOW")
    assert "Upload-Offset: 65536" in asked(server, head(f"HEAD {path}", *tus)).head
    assert asked(server, head(f"DELETE {path}", *tus)).status == 204


def test_waiting_for_a_job_is_not_being_slow(start: Start, key: str, sessions: Sessions) -> None:
    server = start(**SHORT)
    with sessions.begin() as session:
        job = builders.make_job(session)
    assert 2 < timed(server, f"/jobs/{job.id}", key, "Prefer: wait=2") < 4
    with connected(server, head(f"GET /jobs/{job.id}/events", key, "Accept: text/event-stream")) as stream:
        time.sleep(3)
        asked(server, head(f"POST /jobs/{job.id}/cancel", key, "Connection: close"))
        seen = bytearray()
        while b"cancelled" not in seen:
            seen += stream.recv(65536)


def test_an_answer_that_nobody_takes_is_given_up(start: Start) -> None:
    server = start(**SHORT)
    asked_for = 10  # more than the system takes in advance
    with crowd(server, 1, asked_for * head("GET /docs/swagger-ui-bundle.js"), 65536) as (deaf,):
        time.sleep(3 + 4 * SHORT["body_seconds"])
        deaf.settimeout(20)
        assert 0 < read(deaf).count(b"HTTP/1.1 200 OK") < asked_for


def test_an_answer_that_is_taken_slowly_comes_whole(start: Start) -> None:
    server = start(**SHORT)
    with crowd(server, 1, head("GET /docs/swagger-ui-bundle.js", "Connection: close"), 65536) as (slow,):
        data = b""
        while block := slow.recv(100_000):
            data += block
            time.sleep(0.1)
    assert answer_of(data).body == (files("flask_swagger_ui") / "dist" / "swagger-ui-bundle.js").read_bytes()


# --- limits ---


def test_an_address_loses_its_idle_connections_before_it_is_refused_one(start: Start, key: str) -> None:
    server = start(address_connections=8)
    with crowd(server, 20, HALF):
        assert timed(server, "/health/live") < 1
    with crowd(server, 8, head(*KNOWN, key, "Content-Length: 10")):
        time.sleep(0.5)
        refused = asked(server, head("GET /health/live"))
        assert "Retry-After: 1" in refused.head
        refused.problem(503, "TOO_MANY_CONNECTIONS")
    assert eventually(lambda: asked(server, head("GET /health/live", "Connection: close")).status == 200, 5)


@pytest.mark.parametrize("limit", [{"connections": 16}, {"descriptors": 120}], ids=["of connections", "of open files"])
def test_the_newest_connection_takes_the_place_of_the_oldest_without_a_request(
    start: Start, limit: dict[str, int]
) -> None:
    server = start(**limit)
    with crowd(server, 200, HALF):
        assert max(timed(server, "/health/live") for _ in range(5)) < 1


# --- the same as ever ---


def test_an_early_refusal_reaches_a_client_that_goes_on_sending(start: Start) -> None:
    server = start()
    with connected(server, head("POST /scans", f"Content-Type: {TYPE}", "Content-Length: 3000000")) as connection:
        for _ in range(3):
            connection.sendall(bytes(300_000))
            time.sleep(0.1)
        assert answer_of(read(connection)).status == 401


def test_requests_that_come_together_are_answered_in_turn(start: Start, key: str) -> None:
    server = start()
    body = b'{"sha256": []}'
    first = head(*KNOWN, key, f"Content-Length: {len(body)}") + body
    with connected(server, first + first + head("GET /health/live", "Connection: close")) as connection:
        data = read(connection)
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.endswith(b"[]}\n")


def test_a_half_closed_connection_is_answered(start: Start, key: str) -> None:
    server = start()
    body = file() + END
    sent = head("POST /scans", key, f"Content-Type: {TYPE}", f"Content-Length: {len(body)}") + body
    with connected(server, sent) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert answer_of(read(connection)).status in (200, 201)


def test_every_attack_of_the_script_is_one(start: Start) -> None:
    assert {count for _, count in ATTACKS.values()} <= {50, 300, 1000, 1100}
