"""Services of a dispatcher: whatever it does beside dispatching, each at its interval, in threads of their own.

A service does one bounded batch of work and says whether there is more. It never delays dispatching, and an error in
one never stops another.
"""

import threading
import time
from collections.abc import Callable, Sequence

import psycopg2
import structlog
from sqlalchemy.exc import SQLAlchemyError

log = structlog.get_logger()

DATABASE_ERRORS = (SQLAlchemyError, psycopg2.Error)
SOON = 0.1
"""Pause (s) between two batches of a service that has more to do: others get their turn."""
LOOK_SECONDS = 0.25
"""How often a thread looks whether a service is due (s)."""


class Service:
    """One service.

    Args:
        name: for the log.
        seconds: its interval.
        work: one bounded batch; returns whether there is more to do.
    """

    def __init__(self, name: str, seconds: float, work: Callable[[], bool]) -> None:
        self.name = name
        self._seconds, self._work, self._next = seconds, work, 0.0

    def is_due(self) -> bool:
        """Whether its interval is over."""
        return time.monotonic() >= self._next

    def hurry(self) -> None:
        """Be due now."""
        self._next = 0.0

    def run(self) -> None:
        """Do one batch. An error is logged, and the next interval tries again."""
        self._next = time.monotonic() + self._seconds
        try:
            if self._work():
                self._next = time.monotonic() + SOON
        except DATABASE_ERRORS as error:
            log.warning("service_interrupted", service=self.name, error=type(error).__name__)
        except Exception as error:  # the store is away, or a defect: neither may end the thread
            log.error("service_failed", service=self.name, error=type(error).__name__)


class ServiceThread:
    """Runs services one after another.

    Args:
        may_run: whether to run them now; a dispatcher that stands by runs only its heartbeat.
    """

    def __init__(self, name: str, services: Sequence[Service], may_run: Callable[[], bool] = lambda: True) -> None:
        self._services, self._may_run = services, may_run
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Start nothing more, and wait so long at most for the batch that is running."""
        self._stop.set()
        self._wake.set()
        self._thread.join(seconds)

    def hurry(self, name: str) -> None:
        """Run this service now, as soon as the one that is running has done its batch."""
        for service in self._services:
            if service.name == name:
                service.hurry()
        self._wake.set()

    def run_due(self) -> None:
        """Run all services that are due, in this thread."""
        for service in self._services:
            if service.is_due() and not self._stop.is_set():
                service.run()

    def _loop(self) -> None:
        while not self._stop.is_set():
            if self._may_run():
                self.run_due()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
