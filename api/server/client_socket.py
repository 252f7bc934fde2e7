"""A client's socket as a thread of the server uses it."""

import errno
import math
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from api.server.outgoing import Outgoing
from api.server.patience import Patience

LEFT_OVER = 256 * 1024
"""Bytes of an answer of known length that a thread need not see off: the event loop sends them."""

GRACE_SECONDS = 0.5
"""No client is called slow so soon after the head of its request."""


@dataclass(frozen=True)
class Limits:
    """What clients are held to.

    Args:
        read_seconds: longest silence within a body (s).
        write_seconds: longest time in which a client takes nothing of its answer (s). Longer than `read_seconds`,
            since its system reads ahead: what a slow client takes comes in bursts.
        pace: least bytes per second of a body and of an answer.
    """

    read_seconds: float
    write_seconds: float
    pace: float


class ClientSocket:
    """A non-blocking socket that looks like a blocking one, but loses its patience with a slow client.

    gunicorn reads bodies and writes answers with it. What it raises then is a TimeoutError with ECONNRESET, which
    gunicorn takes for a lost connection.
    """

    def __init__(self, raw: socket.socket, limits: Limits) -> None:
        raw.setblocking(False)
        self.raw, self.outgoing = raw, Outgoing()
        self.waits = False
        """Whether a thread is waiting for the client now."""
        self._limits = limits
        self._may_wait = True
        self.begin_request()

    def begin_request(self) -> None:
        """A new request: what the one before was like does not count."""
        self._reading = Patience(self._limits.read_seconds, self._limits.pace)
        self.writing = Patience(self._limits.write_seconds, self._limits.pace)
        self._began, self._moved = time.monotonic(), 0
        self._left_over: int | None = None

    def pace(self) -> float:
        """Bytes per second since the request began; infinite at first, when its body may still be on its way."""
        seconds = time.monotonic() - self._began
        return self._moved / seconds if seconds > GRACE_SECONDS else math.inf

    def fileno(self) -> int:
        """The descriptor."""
        return self.raw.fileno()

    def setblocking(self, flag: bool) -> None:
        """gunicorn calls it; nothing changes."""

    def settimeout(self, seconds: float) -> None:
        """gunicorn calls it to drain a connection in the thread, which the event loop does instead."""
        raise _too_slow()

    def recv(self, size: int) -> bytes:
        """Some bytes, as `socket.recv`.

        Raises:
            TimeoutError: the client is too slow.
            OSError: the connection is lost.
        """
        while True:
            try:
                data = self.raw.recv(size)
            except BlockingIOError:
                self._wait(select.POLLIN, self._reading)
                continue
            self._moved += len(data)
            self._reading.spend(0, len(data))
            return data

    def sendall(self, data: bytes) -> None:
        """Send, as `socket.sendall`, but for the last `LEFT_OVER` bytes of an answer that says how long it is.

        Raises:
            TimeoutError: the client is too slow.
            OSError: the connection is lost.
        """
        if self._left_over is None:  # the head of the answer. What follows of a stream must not lie here
            self._left_over = LEFT_OVER if b"\r\ncontent-length:" in data.lower() else 0
        self.outgoing.add(data)
        self.push()
        while self.outgoing.held > self._left_over:
            self._wait(select.POLLOUT, self.writing)
            self.push()

    def send(self, data: bytes) -> int:
        """Send all of an interim answer, such as 100 Continue."""
        self.outgoing.add(data)
        self.push()
        return len(data)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int = 0) -> int:
        """Leave a file to the event loop. It has the same effect as `socket.sendfile`, later."""
        self.outgoing.add_file(file.fileno(), offset, count)
        self.push()
        return count

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """In this block, reading what has not come yet is a TimeoutError."""
        self._may_wait = False
        try:
            yield
        finally:
            self._may_wait = True

    def shutdown(self, how: int) -> None:
        """As `socket.shutdown`; without effect on a connection that is lost."""
        with suppress(OSError):
            self.raw.shutdown(how)

    def close(self) -> None:
        """gunicorn calls it in a thread; the event loop closes."""

    def release(self) -> None:
        """Close it, and drop what was not sent."""
        self.outgoing.close()
        self.raw.close()

    def push(self) -> None:
        """Send what the network takes now."""
        sent = self.outgoing.send(self.raw)
        self._moved += sent
        self.writing.spend(0, sent)

    def _wait(self, events: int, patience: Patience) -> None:
        if not self._may_wait:
            raise _too_slow()
        poll, began = select.poll(), time.monotonic()
        poll.register(self.raw, events)
        self.waits = True
        try:
            ready = poll.poll(patience.left * 1000)
        finally:
            self.waits = False
        if not patience.spend(time.monotonic() - began) or not ready:
            raise _too_slow()


def _too_slow() -> TimeoutError:
    return TimeoutError(errno.ECONNRESET, "The client is too slow.")
