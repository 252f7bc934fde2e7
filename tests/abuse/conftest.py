# ruff: noqa: F811 (helpers have parameters of the name of a fixture)
"""A server to attack, with short deadlines, and raw connections to it."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from jobs.settings import Settings
from tests.abuse.slow_clients import raise_descriptors
from tests.api.conftest import Server, app, champion, client, door, server, stranger  # noqa: F401  (fixtures)

SHORT = {"head_seconds": 1.0, "body_seconds": 0.5}
Start = Callable[..., Server]


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Starts a server with other settings than the defaults."""
    with ExitStack() as servers:

        def begin(descriptors: int | None = None, **other: Any) -> Server:
            server = Server(settings.model_copy(update=other), descriptors)
            server.start()  # its socket takes connections before the application is loaded
            servers.callback(server.kill)
            assert asked(server, head("GET /health/live", "Connection: close")).status == 200
            return server

        yield begin


@dataclass(frozen=True)
class Answer:
    """What came over a connection until the server closed it."""

    status: int
    head: str
    body: bytes

    def problem(self, status: int, code: str) -> dict[str, Any]:
        """The body, which is a problem of the one shape."""
        found = json.loads(self.body)
        assert (self.status, found["status"], found["code"]) == (status, status, code), self
        assert "Content-Type: application/problem+json" in self.head
        assert f"X-Request-Id: {found['request_id']}" in self.head
        assert found["type"] == f"/v1/problems/{code}"
        assert {"title", "detail", "instance"} <= set(found)
        return found


def answer_of(data: bytes) -> Answer:
    """The last answer in these bytes; interim ones come before it."""
    starts = [found.start() for found in re.finditer(rb"HTTP/1\.1 \d{3}", data)]
    head, _, body = data[starts[-1] :].partition(b"\r\n\r\n") if starts else (b"HTTP/1.1 0", b"", b"")
    return Answer(int(head.split(b" ")[1]), head.decode(), body)


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def connected(server: Server, *sent: bytes, seconds: float = 20) -> Iterator[socket.socket]:
    """A connection on which these bytes were sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        for data in sent:
            connection.sendall(data)
        yield connection


def asked(server: Server, sent: bytes) -> Answer:
    """The answer to these bytes."""
    with connected(server, sent) as connection:
        return answer_of(read(connection))


@contextmanager
def crowd(server: Server, number: int, sent: bytes = b"", buffer: int | None = None) -> Iterator[list[socket.socket]]:
    """So many connections, each of which sends this. With a small buffer, the system reads nothing ahead."""
    raise_descriptors()
    with ExitStack() as connections:
        found = []
        for _ in range(number):
            one = connections.enter_context(socket.socket())
            if buffer is not None:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            one.connect(("127.0.0.1", server.port))
            one.sendall(sent)
            found.append(one)
        yield found


def head(start: str, *headers: str) -> bytes:
    """A whole head."""
    return "\r\n".join([f"{start} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def timed(server: Server, path: str, *headers: str) -> float:
    """Seconds that a 200 took, on a connection of its own."""
    began = time.monotonic()
    found = asked(server, head(f"GET {path}", "Connection: close", *headers))
    assert found.status == 200, found
    return time.monotonic() - began
