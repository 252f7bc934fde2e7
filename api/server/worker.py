"""gunicorn's threaded worker, with an event loop that does all waiting for clients who have no request yet.

gunicorn 26's gthread gives a connection to a thread before its head has come, waits for bodies and for slow readers
without limit, and closes connections in its only event loop, for up to two seconds each. Here the loop reads the heads,
sends the ends of answers and closes; a thread gets a connection with a whole head, and waits for the rest of it with
`Patience`. Whatever waits can be given up when others need its place: the connections without a request first.
"""

import errno
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from api.server.client_socket import Limits
from api.server.connection import READ_BYTES, Connection
from api.server.refusals import LARGE_HEAD, MANY_CONNECTIONS, SLOW_HEAD, Refusal, answer, refusal_of
from api.server.waiting import Waiting

ACCEPTED_AT_ONCE = 64
CLOSING_SECONDS = 2.0
"""How long a client may go on sending after an answer that did not wait for all it had to send."""
HELD_BYTES = 32 * 1024 * 1024
"""Most bytes in memory of answers that their clients have not taken; beyond it, the slowest is cut off."""
SPARE_THREADS = 16
"""With fewer free threads than this, those that wait for slow clients are freed."""
SLOW_PACE = 10_000
"""A client is slow, then, below this many bytes per second."""
SPARE_DESCRIPTORS = 256
"""Left for files, Postgres, and what is being sent from files."""
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_CONNECTION = (errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO)


class Worker(ThreadWorker):
    """What `worker_class` of gunicorn's configuration names."""

    def load_wsgi(self) -> None:
        """Load the application, whose settings say what clients are held to."""
        super().load_wsgi()
        settings = self.wsgi.extensions["renalq"].settings
        self.worker_connections = _most_connections(settings.connections)
        self._limits = Limits(settings.body_seconds, 4 * settings.body_seconds, settings.least_pace)
        self._most_of_address = settings.address_connections or self.worker_connections
        self._addresses: Counter[str] = Counter()
        self._heads, self._idle = Waiting(settings.head_seconds), Waiting(self.cfg.keepalive)
        self._sending, self._closing = Waiting(self._limits.write_seconds), Waiting(CLOSING_SECONDS)
        self._in_threads: set[Connection] = set()

    # --- connections come and go ---

    def accept(self, listener: socket.socket) -> None:
        """Take all connections that have come."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                raw, client = listener.accept()
            except OSError as error:
                if error.errno in NO_DESCRIPTORS:
                    # The limit is lower than was thought. gunicorn accepts no more until one of them is closed.
                    self.worker_connections = max(self.nr_conns, 1)
                    self._give_up_one()
                elif error.errno not in NO_CONNECTION:
                    raise
                return
            self._welcome(Connection(self.cfg, raw, client, listener.getsockname(), self._limits))

    def _welcome(self, conn: Connection) -> None:
        while full := self._addresses[conn.address] >= self._most_of_address:
            if not self._give_up_one(conn.address):
                break
        if self.nr_conns + 1 >= self.worker_connections:
            self._give_up_one()
        self.nr_conns += 1
        self._addresses[conn.address] += 1
        if full:
            self._refuse(conn, MANY_CONNECTIONS)
        else:
            self._await_head(conn)

    def _give_up_one(self, address: str | None = None) -> bool:
        """Close the connection (of this address) that has waited longest without a request. Whether there was one."""
        for equals in ((self._heads, self._closing), (self._idle,), (self._sending,)):
            found = [conn for waiting in equals if (conn := waiting.oldest(address)) is not None]
            if found:
                self._close(min(found, key=lambda conn: conn.since))
                return True
        return False

    def _close(self, conn: Connection) -> None:
        self._leave_loop(conn)
        conn.sock.release()
        self.nr_conns -= 1
        self._addresses[conn.address] -= 1
        if not self._addresses[conn.address]:
            del self._addresses[conn.address]

    # --- waiting in the event loop ---

    def _wait(self, conn: Connection, waiting: Waiting, events: int, callback: Callable[[Connection], None]) -> None:
        waiting.add(conn)
        self.poller.register(conn.sock.raw, events, partial(self._call, callback, conn, waiting))

    def _call(self, callback: Callable[[Connection], None], conn: Connection, waiting: Waiting, fileobj: Any) -> None:
        if conn not in waiting:
            return  # it was closed for the sake of another, whose event came in the same round
        try:
            callback(conn)
        except OSError:
            self._close(conn)

    def _leave_loop(self, conn: Connection) -> None:
        for waiting in (self._heads, self._idle, self._sending, self._closing):
            if conn in waiting:
                waiting.remove(conn)
                self.poller.unregister(conn.sock.raw)

    def _await_head(self, conn: Connection) -> None:
        """Wait for a request; what came behind the one before may be a whole one."""
        if conn.has_head():
            self._dispatch(conn)
            return
        first = conn.parser.req_count == 0 or conn.head
        self._wait(conn, self._heads if first else self._idle, selectors.EVENT_READ, self._read_head)

    def _read_head(self, conn: Connection) -> None:
        data = conn.sock.raw.recv(READ_BYTES)
        if not data:
            self._close(conn)
            return
        conn.head += data
        if conn.has_large_head():
            self._refuse(conn, LARGE_HEAD)
        elif conn.has_head():
            self._leave_loop(conn)
            self._dispatch(conn)
        elif conn in self._idle:  # the time for the head begins now
            self._leave_loop(conn)
            self._await_head(conn)

    def _refuse(self, conn: Connection, refusal: Refusal) -> None:
        self._leave_loop(conn)
        conn.kept = conn.drained = False
        conn.sock.outgoing.add(answer(refusal))
        self._send_rest(conn)

    # --- requests ---

    def _dispatch(self, conn: Connection) -> None:
        conn.begin_request()
        self._in_threads.add(conn)
        self.enqueue_req(conn)
        self._free_threads()

    def _free_threads(self) -> None:
        """Where threads run short, cut off the slowest clients whose threads only wait for them."""
        missing = len(self._in_threads) - (self.cfg.threads - SPARE_THREADS)
        if missing > 0:
            waiting = [(conn.sock.pace(), conn.sock) for conn in self._in_threads if conn.sock.waits]
            slow = sorted((pair for pair in waiting if pair[0] < SLOW_PACE), key=lambda pair: pair[0])
            for _, sock in slow[:missing]:
                sock.shutdown(socket.SHUT_RDWR)

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """Whether another request may come on this connection. Called in the thread."""
        return conn.drain() and keepalive

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer a request that is none, or one that broke the application. Called in the thread."""
        refusal = refusal_of(exc)
        if refusal.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            self.log.exception(exc)
        client.sendall(answer(refusal))

    def finish_request(self, conn: Connection, fs: "Future[bool]") -> None:
        """The thread is done; go on in the event loop."""
        self._in_threads.discard(conn)
        failed = fs.cancelled() or fs.exception() is not None
        conn.end_request(kept=self.alive and not failed and bool(fs.result()))
        self._send_rest(conn)

    def _send_rest(self, conn: Connection) -> None:
        """Send what is left of the answer, then wait for the next request or close."""
        if conn.sock.outgoing:
            self._wait(conn, self._sending, selectors.EVENT_WRITE, self._send)
            self._bound_memory()
        else:
            self._after_answer(conn)

    def _send(self, conn: Connection) -> None:
        waited = time.monotonic() - conn.since
        conn.sock.push()
        self._leave_loop(conn)
        if not conn.sock.outgoing:
            self._after_answer(conn)
        elif conn.sock.writing.spend(waited):
            self._wait(conn, self._sending, selectors.EVENT_WRITE, self._send)
        else:
            self._close(conn)

    def _bound_memory(self) -> None:
        holding = [conn for conn in self._sending if conn.sock.outgoing.held]
        if sum(conn.sock.outgoing.held for conn in holding) > HELD_BYTES:
            self._close(min(holding, key=lambda conn: conn.sock.pace()))

    def _after_answer(self, conn: Connection) -> None:
        if conn.kept:
            self._await_head(conn)
        elif conn.drained:
            self._close(conn)
        else:  # closed at once, what the client still sends would be reset, and perhaps the answer with it
            conn.sock.shutdown(socket.SHUT_WR)
            self._wait(conn, self._closing, selectors.EVENT_READ, self._discard)

    def _discard(self, conn: Connection) -> None:
        if not conn.sock.raw.recv(READ_BYTES):
            self._close(conn)

    # --- deadlines ---

    def murder_keepalived(self) -> None:
        """Close what has waited too long; all that waits for a request, when the worker ends.
        Called after each round of the loop."""
        self._free_threads()
        for conn in self._heads.expired():
            if conn.head:
                self._refuse(conn, SLOW_HEAD)
            else:
                self._close(conn)
        for waiting in (self._idle, self._sending, self._closing):
            for conn in waiting.expired():
                self._close(conn)
        if not self.alive:
            for conn in (*self._heads, *self._idle):
                self._close(conn)


def _most_connections(wanted: int) -> int:
    """As many as wanted, or as the limit of descriptors allows, which is raised if it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_DESCRIPTORS
    if resource.RLIM_INFINITY != soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - SPARE_DESCRIPTORS, soft // 2))
