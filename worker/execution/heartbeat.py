"""The watch over the unit that a process holds: it beats, looks whether the work is still wanted, and ends what hangs.

Its thread lives as long as the process: to start one for every unit would cost more than a short unit's bookkeeping.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.errors import LeaseLost
from jobs.queue import leases
from worker.execution.interrupts import CancelRequested, Draining, Yielding
from worker.execution.signals import draining

if TYPE_CHECKING:
    from worker.execution.unit import Held

log = structlog.get_logger()


class Watch:
    """One thread, and the unit that it watches over, if any."""

    def __init__(self) -> None:
        self._held: Held | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def over(self, held: "Held | None") -> None:
        """Watch over this unit from now on, or over none."""
        with self._changed:
            self._held = held
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held is not None)
                held = self._held
            if held is not None:
                _watch(held, lambda seconds, held=held: self._has_ended(held, seconds))  # type: ignore[misc]

    def _has_ended(self, held: "Held", seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._held is not held, seconds)


_idle: list[Watch] = []


@contextmanager
def watched(held: "Held") -> Iterator[None]:
    """Watch over the unit while the body runs."""
    watch = _idle.pop() if _idle else Watch()
    watch.over(held)
    try:
        yield
    finally:
        watch.over(None)
        _idle.append(watch)


def _watch(held: "Held", has_ended: Callable[[float], bool]) -> None:
    """Beat in time, look in between whether the work is still wanted, and end a body that does not listen."""
    settings = held.resources.settings
    heard = next_beat = time.monotonic()
    while not has_ended(min(settings.watch_seconds, settings.beat_seconds)):
        if held.is_over:  # MLflow may still be told of it
            continue
        now = time.monotonic()
        if draining():
            held.interrupt(Draining())
        if _ask(held, beat=now >= next_beat):
            heard = now
            next_beat = now + settings.beat_seconds if now >= next_beat else next_beat
        if now - heard > settings.give_up_seconds:
            held.interrupt(LeaseLost("No beat could be written for too long."))
        if held.is_overdue() and not has_ended(0):
            _end_by_force(held)


def _ask(held: "Held", beat: bool) -> bool:
    """Beat, or only look. False: Postgres did not answer."""
    try:
        with held.resources.beats.begin() as session:
            if beat and not leases.beat(session, held.claim, held.resources.settings.lease_seconds):
                standing = leases.Standing(held=False)
            else:
                standing = leases.standing(session, held.claim)
    except SQLAlchemyError as error:
        log.warning("beat_failed", error=type(error).__name__)
        return False
    if not standing.held:
        held.interrupt(LeaseLost())
    elif standing.cancel_requested:
        held.interrupt(CancelRequested())
    elif standing.yield_requested:
        held.interrupt(Yielding())
    return True


def _end_by_force(held: "Held") -> None:
    """The body hangs in a call that hears nothing. Its end is written for it, and this process goes, the device's
    memory with it; Celery's pool starts another."""
    log.error("killed_itself", why=type(held.interrupted).__name__)
    held.end(LeaseLost())
    os.kill(os.getpid(), signal.SIGKILL)
