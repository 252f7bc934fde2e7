"""What the server itself refuses is told as everything else is, and repeats nothing of what was sent."""

import pytest

from tests.abuse.conftest import Start, asked, head
from tests.api.conftest import Server

pytestmark = pytest.mark.slow

CANARY = "DOE^JANE"
WRONG: dict[str, tuple[bytes, int]] = {
    "no request line": (f"{CANARY}\r\n\r\n".encode(), 400),
    "no version": (f"GET /{CANARY}\r\n\r\n".encode(), 400),
    "another protocol": (f"GET /{CANARY} HTTX/1.1\r\n\r\n".encode(), 400),
    "a future version": (f"GET /{CANARY} HTTP/9.9\r\n\r\n".encode(), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY.encode() + b"\r\n\r\n", 400),
    "a long address": (head(f"GET /{CANARY}{5000 * 'a'}"), 414),
    "no colon": (head("GET /health/live", CANARY), 400),
    "a space in a name": (head("GET /health/live", f"{CANARY} : a"), 400),
    "a control character": (head("GET /health/live", f"X-Name: {CANARY}\x01"), 400),
    "folding": (head("GET /health/live", "X-Name: a", f"  {CANARY}"), 400),
    "two hosts": (head("GET /health/live", f"Host: {CANARY}"), 400),
    "two lengths": (head("POST /scans", "Content-Length: 1", f"Content-Length: 2{CANARY}"), 400),
    "length and chunks": (head("POST /scans", "Content-Length: 1", "Transfer-Encoding: chunked"), 400),
    "an unknown coding": (head("POST /scans", f"Transfer-Encoding: {CANARY}"), 501),
    "an unknown expectation": (head("POST /scans", f"Expect: {CANARY}"), 417),
    "a long header": (head("GET /health/live", f"X-Name: {CANARY}{9000 * 'a'}"), 431),
    "many headers": (head("GET /health/live", *(f"X-{n}: {CANARY}" for n in range(101))), 431),
    "large headers": (head("GET /health/live", *(f"X-{n}: {CANARY}{7000 * 'a'}" for n in range(5))), 431),
    "a head without end": (head("GET /health/live", f"X-Name: {CANARY}")[:-2] + 20_000 * b"a", 431),
}


def test_what_is_no_request_is_refused_in_the_one_shape(start: Start) -> None:
    server = start()
    for what, (sent, status) in WRONG.items():
        found = asked(server, sent)
        assert found.status == status, (what, found)
        assert CANARY not in found.problem(status, "BAD_REQUEST")["detail"], what
    assert CANARY not in log_of(server)
    assert asked(server, head("GET /health/live", "Connection: close")).status == 200


def log_of(server: Server) -> str:
    """All that it has logged."""
    return (server._settings.home / "api.log").read_text()
