"""A TCP proxy of our own, for the faults of a network: dead silence, a cut line, a line that works again."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOOPBACK = "127.0.0.1"


class Proxy:
    """Stands on `port` before a server. Frozen, it takes connections and bytes and forwards neither; connections that
    were frozen stay dead for ever, as those to a machine that lost its power do."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._lines: list[_Line] = []
        self._frozen = False
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def freeze(self) -> None:
        """Half-open: nothing is refused, and nothing is answered."""
        with self._lock:
            self._frozen = True
            for line in self._lines:
                line.frozen.set()

    def thaw(self) -> None:
        """New connections work; those from before stay dead."""
        self._frozen = False

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            line.reset()

    def close(self) -> None:
        """End."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._open(client)

    def _open(self, client: socket.socket) -> None:
        try:
            server = None if self._frozen else socket.create_connection(self._target, timeout=5)
        except OSError:
            _reset(client)
            return
        line = _Line(client, server)
        with self._lock:
            self._lines.append(line)
            if self._frozen:
                line.frozen.set()
        line.start()


class _Line:
    """One connection: two sockets and a thread for each direction."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self._client, self._server = client, server
        self.frozen = threading.Event()

    def start(self) -> None:
        if self._server is None:
            return
        self._server.settimeout(None)
        for source, target in ((self._client, self._server), (self._server, self._client)):
            threading.Thread(target=self._pump, args=(source, target), name="line", daemon=True).start()

    def reset(self) -> None:
        for end in filter(None, (self._client, self._server)):
            _reset(end)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.frozen.is_set():
                    return
                target.sendall(data)
        if not self.frozen.is_set():
            self.reset()


def _reset(end: socket.socket) -> None:
    """Closed with SO_LINGER 0, so that the other side gets an RST."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
    end.close()


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """A proxy for the length of the block."""
    opened = Proxy(host, port)
    try:
        yield opened
    finally:
        opened.close()
