"""Connections that the event loop holds, in the order in which they began to wait."""

import time
from collections.abc import Iterator

from api.server.connection import Connection


class Waiting:
    """Connections that wait for the same thing, none longer than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._connections: dict[Connection, None] = {}

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._connections

    def __iter__(self) -> Iterator[Connection]:
        """The longest waiting first. What is added or removed meanwhile has no effect."""
        return iter(tuple(self._connections))

    def add(self, connection: Connection) -> None:
        """It waits from now on."""
        connection.since = time.monotonic()
        self._connections[connection] = None

    def remove(self, connection: Connection) -> None:
        """It waits no longer."""
        self._connections.pop(connection, None)

    def oldest(self, address: str | None = None) -> Connection | None:
        """The one that waits longest (of this address)."""
        return next((conn for conn in self._connections if address in (None, conn.address)), None)

    def expired(self) -> Iterator[Connection]:
        """Those that have waited too long; each is to be removed before the next is asked for."""
        bound = time.monotonic() - self._seconds
        while (connection := self.oldest()) is not None and connection.since < bound:
            yield connection
