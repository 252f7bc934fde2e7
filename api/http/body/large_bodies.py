"""Few large bodies at a time are turned into objects: memory and the interpreter's lock are left to other clients."""

import ctypes
import threading
from collections import Counter

from jobs.errors import Unavailable

AT_ONCE = 3
"""Requests that hold the objects of a large body, of all tenants: each takes 30 MB at most."""
OF_ONE_TENANT = 2
"""Of them, those of one tenant."""
MOST_WAITING = 16
"""Requests of one tenant that wait for their turn: each holds a thread."""
WAIT_SECONDS = 20.0


class ServerBusy(Unavailable):
    """Other large bodies are being read. Send this one again shortly, or fewer at a time."""

    code = "SERVER_BUSY"


class LargeBodies:
    """The turns of requests with large bodies. What it counts is of one process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def enter(self, tenant_id: str) -> None:
        """Wait for a turn, `WAIT_SECONDS` at most.

        Raises:
            ServerBusy
        """
        with self._changed:
            if self._waiting[tenant_id] >= MOST_WAITING:
                raise ServerBusy
            self._waiting[tenant_id] += 1
            try:
                if not self._changed.wait_for(lambda: self._has_room(tenant_id), WAIT_SECONDS):
                    raise ServerBusy
                self._held[tenant_id] += 1
            finally:
                self._waiting[tenant_id] -= 1

    def leave(self, tenant_id: str) -> None:
        """End a turn. What the request has freed is given back to the system."""
        _trim()
        with self._changed:
            self._held[tenant_id] -= 1
            self._changed.notify_all()

    def _has_room(self, tenant_id: str) -> bool:
        return self._held.total() < AT_ONCE and self._held[tenant_id] < OF_ONE_TENANT


def _trim() -> None:
    """glibc keeps what threads free (malloc_trim(3)); other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
