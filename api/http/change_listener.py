"""Waiting for jobs to change without holding a database connection: one listener thread wakes all waiters.

The thread hears Postgres' NOTIFY on one connection of its own. While it has none, waiters look for themselves every
`POLL_SECONDS`: a lost listener makes them slower, never deaf.
"""

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.engine import Engine

from jobs.db import listening
from jobs.errors import TooManyWatchers
from jobs.queue.job_events import JOBS_CHANNEL

POLL_SECONDS = 2.0
"""How often a waiter looks for itself while no listener is connected."""
LISTEN_SECONDS = 5.0
"""How long the listener waits for a notification before it looks whether it is still wanted."""

log = structlog.get_logger()


class Bell:
    """Rings when one job may have changed. Made by `Changes.watch`."""

    def __init__(self, changes: "Changes") -> None:
        self._changes = changes
        self.event = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, `seconds` at most. False: nothing rang in that time. Returns at once when we shut down.

        Without a listener it says True every `POLL_SECONDS`: look for yourself.
        """
        deadline = time.monotonic() + seconds
        while not self._changes.closed:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self.event.wait(min(left, POLL_SECONDS)):
                self.event.clear()
                return True
            if not self._changes.listening:
                return True
        return True


class Changes:
    """The waiters of one process, and the thread that wakes them.

    Args:
        engine: where to listen.
        slots: how many may wait at once.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._lock = threading.Lock()
        self._bells: dict[uuid.UUID, set[Bell]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self.listening = False
        self.closed = False

    @contextmanager
    def watch(self, job_id: uuid.UUID) -> Iterator[Bell]:
        """Watch a job for the length of the block. Look at the job only after this, or a change may slip by.

        Raises:
            TooManyWatchers: all slots are taken.
        """
        bell = Bell(self)
        with self._lock:
            if self.waiting >= self._slots or self.closed:
                raise TooManyWatchers
            self._bells[job_id].add(bell)
            self._start()
        try:
            yield bell
        finally:
            with self._lock:
                self._bells[job_id].discard(bell)
                if not self._bells[job_id]:
                    del self._bells[job_id]

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return sum(map(len, self._bells.values()))

    def close(self) -> None:
        """Wake everybody for good: the process ends."""
        self.closed = True
        self._ring_all()

    def _start(self) -> None:
        """Start the listener with the first waiter, so that a process that nobody waits on has no thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="changes", daemon=True)
            self._thread.start()

    def _listen(self) -> None:
        while not self.closed:
            try:
                self._listen_once()
            except Exception as error:  # whatever it was: a dead listener would leave everybody polling for ever
                log.warning("listener_lost", error=type(error).__name__)
            self.listening = False
            time.sleep(1)

    def _listen_once(self) -> None:
        with listening(self._engine, JOBS_CHANNEL) as doorbell:
            self.listening = True
            self._ring_all()  # what changed while nobody listened
            while not self.closed:
                for payload in doorbell.wait(LISTEN_SECONDS):
                    self._ring(payload)

    def _ring(self, payload: str) -> None:
        try:
            job_id = uuid.UUID(payload)
        except ValueError:
            return
        with self._lock:
            bells = tuple(self._bells.get(job_id, ()))
        for bell in bells:
            bell.event.set()

    def _ring_all(self) -> None:
        with self._lock:
            bells = [bell for watching in self._bells.values() for bell in watching]
        for bell in bells:
            bell.event.set()
