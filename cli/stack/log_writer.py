"""A process that writes what the services of a stack print, and rotates the files.

Services print into pipes. `renalq up` holds both ends of each: a log writer that dies is replaced, and loses only what
it has just read; a restarted service goes on in its file. The log writer ends when nobody can print any more, so it
outlives a killed `renalq up` until its services have ended.
"""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

OLD_COPIES = 3
"""NAME.log.1 is the newest of them."""
NAME_BYTES = 64
CHUNK_BYTES = 16 * 1024
FLUSH_SECONDS, CLOSE_SECONDS = 1.0, 5.0


class LogWriter:
    """The side of `renalq up`.

    Args:
        keep_open: descriptor of the home's lock, which is not free before the last line is written.
        log_bytes: size at which a file is rotated (bytes).
    """

    def __init__(self, folder: Path, keep_open: int, log_bytes: int) -> None:
        self._folder, self._keep_open, self._log_bytes = folder, keep_open, log_bytes
        self._pipes: dict[str, tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cli.stack.log_writer", str(self._folder), str(self._log_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[self._keep_open],
                start_new_session=True,
            )
        for name in self._pipes:
            self._announce(name)

    def _announce(self, name: str) -> None:
        with suppress(BrokenPipeError):  # it has just died; `ensure` will start another
            socket.send_fds(self._control, [name.encode().ljust(NAME_BYTES)], [self._pipes[name][0]])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ensure(self) -> None:
        """Start another one if it has died. What was printed meanwhile waits in the pipes."""
        if self._process.poll() is not None:
            self._control.close()
            self._start()

    def pipe(self, name: str) -> int:
        """The descriptor into which the service `name` prints, the same one each time."""
        if name not in self._pipes:
            self._pipes[name] = os.pipe()
            self._announce(name)
        return self._pipes[name][1]

    def flush(self, name: str) -> None:
        """Wait until what the service has printed stands in its file; at most `FLUSH_SECONDS`."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while _waiting_bytes(self._pipes[name][0]) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # it has read the last bytes, and writes them now

    def close(self) -> None:
        """Let it write the rest, and end. All services must have ended."""
        self._control.close()
        for ends in self._pipes.values():
            for end in ends:
                os.close(end)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self._process.kill()
        self._process.wait()


def _waiting_bytes(descriptor: int) -> int:
    import termios

    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


class _Log(RotatingFileHandler):
    """One file. It is given whole lines, so that none is divided between two files."""

    terminator = ""

    def __init__(self, path: Path, log_bytes: int) -> None:
        super().__init__(
            path, maxBytes=log_bytes, backupCount=OLD_COPIES, encoding="utf-8", errors="surrogateescape", delay=True
        )
        self._begun = b""

    def read_from(self, descriptor: int) -> bool:
        """Write what has come, up to the last whole line. False at the end of the pipe."""
        data = os.read(descriptor, CHUNK_BYTES)
        begun = self._begun + data
        end = begun.rfind(b"\n") + 1
        if not data or len(begun) - end > CHUNK_BYTES:  # the last bytes, or a line without end
            end = len(begun)
        self._begun = begun[end:]
        if end:
            self._write(begun[:end])
        return bool(data)

    def _write(self, text: bytes) -> None:
        self.emit(logging.makeLogRecord({"msg": text.decode("utf-8", "surrogateescape")}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (a name of logging's)
        """A full disk: drop what cannot be written, since services wait while nobody reads from their pipe."""
        if self.stream is not None:
            with suppress(OSError):
                self.stream.close()
        self.stream = None  # opened again with the next lines
        self._begun = b"\n" + self._begun  # the file may end in the middle of one


def main(folder: Path, log_bytes: int) -> None:
    """Write until the last pipe has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=sys.stdin.fileno()) as control, selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                if key.data is None:
                    _add_pipe(control, selector, folder, log_bytes)
                elif not key.data.read_from(key.fd):
                    selector.unregister(key.fd)
                    os.close(key.fd)


def _add_pipe(control: socket.socket, selector: selectors.BaseSelector, folder: Path, log_bytes: int) -> None:
    name, pipes, _, _ = socket.recv_fds(control, NAME_BYTES, 1)
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ, _Log(folder / f"{name.decode().strip()}.log", log_bytes))
    if not name:  # `renalq up` has ended
        selector.unregister(control)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
