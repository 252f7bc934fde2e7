"""The heartbeat of the unit that a process runs: renew the lease, poll for interrupts, kill a body that hangs.

The thread lives as long as the process: starting one per unit would cost more than a short unit's own writes.
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


class HeartbeatThread:
    """A thread, and the unit that it sends heartbeats for, if any."""

    def __init__(self) -> None:
        self._unit: UnitLease | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="sending_heartbeats", daemon=True).start()

    def serve(self, unit: UnitLease | None) -> None:
        """Send heartbeats for this unit from now on, or for none."""
        with self._changed:
            self._unit = unit
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unit is not None)
                unit = self._unit
            if unit is not None:
                _beat_until_ended(unit, lambda seconds, unit=unit: self._has_ended(unit, seconds))  # type: ignore[misc]

    def _has_ended(self, unit: UnitLease, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._unit is not unit, seconds)


_idle: list[HeartbeatThread] = []


@contextmanager
def sending_heartbeats(unit: UnitLease) -> Iterator[None]:
    """Send heartbeats for the unit while the body runs."""
    thread = _idle.pop() if _idle else HeartbeatThread()
    thread.serve(unit)
    try:
        yield
    finally:
        thread.serve(None)
        _idle.append(thread)


def _beat_until_ended(unit: UnitLease, has_ended: Callable[[float], bool]) -> None:
    """Renew the lease in time, poll for interrupts in between, and kill a body that ignores them."""
    settings = unit.resources.settings
    last_answer = next_beat = time.monotonic()
    while not has_ended(min(settings.watch_seconds, settings.beat_seconds)):
        if unit.is_over:  # the body may still write to MLflow
            continue
        now = time.monotonic()
        if draining():
            unit.interrupt(Draining())
        if _poll(unit, beat=now >= next_beat):
            last_answer = now
            next_beat = now + settings.beat_seconds if now >= next_beat else next_beat
        if now - last_answer > settings.give_up_seconds:
            unit.interrupt(LeaseLost("No beat could be written for too long."))
        if unit.is_overdue() and not has_ended(0):
            _kill_self(unit)


def _poll(unit: UnitLease, beat: bool) -> bool:
    """Renew the lease with `beat`, and interrupt the unit if asked to. False: Postgres did not answer."""
    try:
        with unit.resources.autocommit.begin() as session:
            lease = unit.resources.settings.lease_seconds
            status = leases.beat(session, unit.claim, lease) if beat else leases.poll_status(session, unit.claim)
    except SQLAlchemyError as error:
        log.warning("lease_renewal_failed", error=type(error).__name__)
        return False
    if not status.held:
        unit.interrupt(LeaseLost())
    elif status.cancel_requested:
        unit.interrupt(CancelRequested())
    elif status.yield_requested:
        unit.interrupt(Yielding())
    return True


def _kill_self(unit: UnitLease) -> None:
    """End a body that hangs in a call: write its end, and kill this process, which frees the device's memory. Celery's
    pool starts another one."""
    log.error("hung_worker_killed", reason=type(unit.interrupted).__name__)
    unit.end(LeaseLost())
    os.kill(os.getpid(), signal.SIGKILL)
