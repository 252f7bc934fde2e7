"""What is still to be sent to a client, in order: bytes, and parts of files that are read only as they are sent."""

import errno
import os
import socket
from collections import deque
from typing import Protocol

AT_ONCE = 1024 * 1024
"""Most bytes sent by one `send`, so that one fast client does not hold up the others."""
FILE_BLOCK = 256 * 1024


class _Part(Protocol):
    def send(self, sock: socket.socket) -> int:
        """Send some of it; the number of bytes."""
        ...

    def done(self) -> bool:
        """Whether all of it was sent."""
        ...


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def send(self, sock: socket.socket) -> int:
        sent = sock.send(self._left)
        self._left = self._left[sent:]
        return sent

    def done(self) -> bool:
        return not self._left


class _File:
    """A range of an open file. It has a descriptor of its own."""

    def __init__(self, descriptor: int, offset: int, count: int) -> None:
        self._descriptor, self._offset, self._left = os.dup(descriptor), offset, count

    def send(self, sock: socket.socket) -> int:
        sent = os.sendfile(sock.fileno(), self._descriptor, self._offset, min(self._left, FILE_BLOCK))
        if not sent:
            raise ConnectionResetError(errno.ECONNRESET, "The file is shorter than was announced.")
        self._offset, self._left = self._offset + sent, self._left - sent
        return sent

    def done(self) -> bool:
        return not self._left

    def close(self) -> None:
        os.close(self._descriptor)


class Outgoing:
    """A queue of bytes and of ranges of files."""

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque()
        self.held = 0
        """Bytes in memory."""

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, data: bytes) -> None:
        """Bytes to send."""
        if data:
            self._parts.append(_Bytes(data))
            self.held += len(data)

    def add_file(self, descriptor: int, offset: int, count: int) -> None:
        """`count` bytes of a file from `offset` on. The caller may close the descriptor."""
        if count:
            self._parts.append(_File(descriptor, offset, count))

    def send(self, sock: socket.socket) -> int:
        """Send what a non-blocking socket takes now, `AT_ONCE` at most. Returns the number of bytes.

        Raises:
            OSError: the connection is lost.
        """
        total = 0
        while self._parts and total < AT_ONCE:
            part = self._parts[0]
            try:
                sent = part.send(sock)
            except BlockingIOError:
                break
            total += sent
            self.held -= sent if isinstance(part, _Bytes) else 0
            if part.done():
                self._release()
        return total

    def close(self) -> None:
        """Drop what is left."""
        while self._parts:
            self._release()
        self.held = 0

    def _release(self) -> None:
        part = self._parts.popleft()
        if isinstance(part, _File):
            part.close()
