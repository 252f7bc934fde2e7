"""A webhook's receiver: a real HTTP server that keeps what it gets, and answers as a test wants it to."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

from jobs.settings import Settings
from tests.processes import eventually

SHORT = {"webhook_seconds": 0.5, "webhook_retry_seconds": "0.1,0.1,0.1"}
"""Clocks of a test."""


@dataclass(frozen=True)
class Received:
    """One request, as it came."""

    headers: dict[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        """What makes two deliveries the same one."""
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> Any:
        """The event, after the library of Standard Webhooks has checked time and signature."""
        return Webhook(secret).verify(self.body, self.headers)


class Receiver(ThreadingHTTPServer):
    """Answers with the next of `statuses`, and with 204 when there are none left. The path may ask for more:

    `/silent` gets no answer, `/drip` one that never ends, `/to/ADDRESS` is a redirect.
    """

    daemon_threads = True

    def __init__(self, *statuses: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[Received] = []
        self.statuses = list(statuses)

    def handle_error(self, *arguments: object) -> None:
        """Clients that hang up are the point."""

    @property
    def host(self) -> str:
        """As `RENALQ_WEBHOOK_HOSTS` names it."""
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}/hook"

    def counted(self) -> Counter[str]:
        """How often each event came."""
        return Counter(received.event_id for received in list(self.received))

    def first(self, number: int = 1, seconds: float = 20) -> list[Received]:
        """The first requests, as soon as there are so many."""
        eventually(lambda: len(self.received) >= number, seconds, lambda: f"{len(self.received)} came")
        return self.received[:number]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(Received({name.lower(): value for name, value in self.headers.items()}, body))
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"do_{kind}")(rest)

    def do_hook(self, rest: str) -> None:
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if statuses else 204)
        self.end_headers()

    def do_to(self, rest: str) -> None:
        self.send_response(307)
        self.send_header("Location", rest)
        self.end_headers()

    def do_silent(self, rest: str) -> None:
        time.sleep(3)

    def do_drip(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
        for _ in range(30):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    """A receiver that listens as long as the block lasts."""
    with Receiver(*statuses) as receiver:
        threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True).start()
        yield receiver
        receiver.shutdown()


def allowing(settings: Settings, *receivers: Receiver) -> Settings:
    """Short clocks, and these receivers on this machine allowed."""
    return settings.model_copy(update={**SHORT, "webhook_hosts": ",".join(receiver.host for receiver in receivers)})
