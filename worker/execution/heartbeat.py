"""The watch over the unit that a process holds: it beats, looks whether the work is still wanted, and ends what hangs.

Its thread lives as long as the process: to start one for every unit would cost more than a short unit's bookkeeping.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.errors import LeaseLost
from jobs.queue import leases
from worker.execution.signals import draining
from worker.execution.unit import CancelRequested, Draining, UnitLease, Yielding

log = structlog.get_logger()


class Watch:
    """One thread, and the unit that it watches over, if any."""

    def __init__(self) -> None:
        self._unit: UnitLease | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def over(self, unit: UnitLease | None) -> None:
        """Watch over this unit from now on, or over none."""
        with self._changed:
            self._unit = unit
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unit is not None)
                unit = self._unit
            if unit is not None:
                _watch(unit, lambda seconds, unit=unit: self._has_ended(unit, seconds))  # type: ignore[misc]

    def _has_ended(self, unit: UnitLease, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._unit is not unit, seconds)


_idle: list[Watch] = []


@contextmanager
def watched(unit: UnitLease) -> Iterator[None]:
    """Watch over the unit while the body runs."""
    watch = _idle.pop() if _idle else Watch()
    watch.over(unit)
    try:
        yield
    finally:
        watch.over(None)
        _idle.append(watch)


def _watch(unit: UnitLease, has_ended: Callable[[float], bool]) -> None:
    """Beat in time, look in between whether the work is still wanted, and end a body that does not listen."""
    settings = unit.resources.settings
    heard = next_beat = time.monotonic()
    while not has_ended(min(settings.watch_seconds, settings.beat_seconds)):
        if unit.is_over:  # MLflow may still be told of it
            continue
        now = time.monotonic()
        if draining():
            unit.interrupt(Draining())
        if _ask(unit, beat=now >= next_beat):
            heard = now
            next_beat = now + settings.beat_seconds if now >= next_beat else next_beat
        if now - heard > settings.give_up_seconds:
            unit.interrupt(LeaseLost("No beat could be written for too long."))
        if unit.is_overdue() and not has_ended(0):
            _end_by_force(unit)


def _ask(unit: UnitLease, beat: bool) -> bool:
    """Beat, or only look. False: Postgres did not answer."""
    try:
        with unit.resources.beats.begin() as session:
            if beat and not leases.beat(session, unit.claim, unit.resources.settings.lease_seconds):
                standing = leases.UnitStatus(held=False)
            else:
                standing = leases.poll_status(session, unit.claim)
    except SQLAlchemyError as error:
        log.warning("beat_failed", error=type(error).__name__)
        return False
    if not standing.held:
        unit.interrupt(LeaseLost())
    elif standing.cancel_requested:
        unit.interrupt(CancelRequested())
    elif standing.yield_requested:
        unit.interrupt(Yielding())
    return True


def _end_by_force(unit: UnitLease) -> None:
    """The body hangs in a call that hears nothing. Its end is written for it, and this process goes, the device's
    memory with it; Celery's pool starts another."""
    log.error("killed_itself", why=type(unit.interrupted).__name__)
    unit.end(LeaseLost())
    os.kill(os.getpid(), signal.SIGKILL)
