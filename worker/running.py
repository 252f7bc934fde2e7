"""`with running(unit_id)`: claim, heartbeat, cancel and drain watch, exception → state. The only place that does so."""

import errno
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from jobs import lifecycle
from jobs.bookkeeping import Claim, ScanOutcome
from jobs.errors import LeaseLost
from jobs.lifecycle import RetryPolicy
from jobs.tables import Json
from ml.errors import PipelineError
from worker.resources import Resources
from worker.signals import draining
from worker.workspaces import workspace

log = structlog.get_logger()
Answer = TypeVar("Answer")


class WorkFailed(Exception):
    """The unit cannot be done: `code` for programs, `detail` for people, and whether another try may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.error: Json = {"code": code, "detail": detail, "retryable": retryable}


class CancelRequested(Exception):
    """Somebody asked for the job's end."""


class Draining(Exception):
    """This worker is to stop: the unit goes back to the queue."""


class Yielding(Exception):
    """Somebody with a better right waits for this worker: what is left of the unit goes back to the queue."""


class Held:
    """A unit under lease. A thread beats for it; `check()` raises as soon as the work is to stop.

    `outcomes` are the scans that are done: whatever ends the unit, they are written with its end.
    """

    def __init__(self, claim: Claim, resources: Resources) -> None:
        self.claim = claim
        self.resources = resources
        self.outcomes: list[ScanOutcome] = []
        self._interrupted_at = 0.0
        self._interrupted: Exception | None = None
        self._on_interrupt: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def interrupted(self) -> Exception | None:
        """Why the work is to stop, if it is."""
        return self._interrupted

    def check(self) -> None:
        """Go on, or stop.

        Raises:
            CancelRequested, Draining, Yielding, LeaseLost
        """
        if self._interrupted is not None:
            raise self._interrupted

    def when_interrupted(self, stop: Callable[[], None]) -> None:
        """Call `stop` from the watching thread once the work is to end (at once, if it already is)."""
        with self._lock:
            self._on_interrupt.append(stop)
            late = self._interrupted is not None
        if late:
            stop()

    def interrupt(self, why: Exception) -> None:
        """Tell the work to stop. The first reason stands, but a lost lease overrules all."""
        with self._lock:
            first = self._interrupted is None
            if first or isinstance(why, LeaseLost):
                self._interrupted = why
            if first:
                self._interrupted_at = time.monotonic()
            stops = list(self._on_interrupt) if first else []
        for stop in stops:
            stop()

    def report(self, **said: Any) -> None:
        """`lifecycle.report` in a transaction of its own. Raises LeaseLost."""
        self.in_transaction(lambda session: lifecycle.report(session, self.claim, **said))

    def in_transaction(self, verb: Callable[[Session], Answer], to_the_end: bool = False) -> Answer:
        """Do it in a transaction, and anew as long as Postgres is away: its restart costs no work.

        Once the lease is given up, the watch interrupts. `to_the_end`: go on although the work is interrupted.
        """
        deadline = time.monotonic() + self.resources.settings.give_up_seconds
        while True:
            try:
                with self.resources.sessions.begin() as session:
                    return verb(session)
            except SQLAlchemyError as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                log.warning("database_away", error=type(error).__name__)
            if not to_the_end:
                self.check()
            time.sleep(0.2)

    def workspace(self) -> AbstractContextManager[Path]:
        """A scratch folder, removed at the end. The fence in its name keeps two attempts apart."""
        return workspace(self.resources.settings.work, self.claim.unit_id, self.claim.fence)

    def is_overdue(self) -> bool:
        """Whether the work was told to stop and has not, for longer than is asked of it."""
        patience = 2 * self.resources.settings.cancel_grace_seconds
        late = time.monotonic() - self._interrupted_at > patience
        return self._interrupted is not None and not isinstance(self._interrupted, Yielding) and late


def is_away(error: SQLAlchemyError) -> bool:
    """Whether Postgres went away, or gave up on a lock: the same may succeed in a while."""
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


@contextmanager
def running(unit_id: uuid.UUID, worker: str, resources: Resources) -> Iterator[Held | None]:
    """Hold the unit while the body runs; None where the claim is refused.

    The body ends the unit well by itself, in one transaction with its results (`lifecycle.succeed`).
    """
    lease = resources.settings.lease_seconds
    claim = claimed(resources, lambda session: lifecycle.claim(session, unit_id, worker, lease))
    if claim is None:
        log.info("claim_refused", unit_id=str(unit_id))
        yield None
        return
    with holding(claim, resources) as held:
        yield held


@contextmanager
def holding(claim: Claim, resources: Resources) -> Iterator[Held]:
    """Hold a unit that is claimed. Whatever ends the body becomes a state here."""
    held = Held(claim, resources)
    structlog.contextvars.bind_contextvars(job_id=str(claim.job_id), unit_id=str(claim.unit_id), attempt=claim.attempt)
    log.info("claimed", kind=claim.kind)
    try:
        with _beating(held):
            try:
                yield held
                log.info("unit_done")
            except Exception as error:
                _end(held, error)
    finally:
        structlog.contextvars.unbind_contextvars("job_id", "unit_id", "attempt")


def claimed(resources: Resources, verb: Callable[[Session], Claim | None]) -> Claim | None:
    """Claim by the verb. None also where Postgres is away: the unit will be rung again."""
    for last in (False, True):
        try:
            with resources.singles.begin() as session:
                return verb(session)
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            if last:  # the first failure may only have found a connection that Postgres had closed
                log.warning("claim_failed", error=type(error).__name__)
    return None


def _end(held: Held, error: Exception) -> None:
    """Exception → state. A database that is away leaves the unit to the reaper: its lease runs out by itself."""
    why = held.interrupted or error
    try:
        held.in_transaction(lambda session: _write_end(session, held, why), to_the_end=True)
    except LeaseLost:
        log.warning("lease_lost")
    except SQLAlchemyError as unreachable:
        log.error("end_not_written", error=type(unreachable).__name__)


def _write_end(session: Session, held: Held, why: Exception) -> None:
    done = list(held.outcomes)
    if isinstance(why, LeaseLost):
        raise why
    if isinstance(why, CancelRequested):
        lifecycle.cancelled(session, held.claim, done)
    elif isinstance(why, Draining | Yielding):
        lifecycle.requeue(session, held.claim, "DRAINED" if isinstance(why, Draining) else "YIELDED", done)
    else:
        error = _error_of(why)
        log.error("unit_failed", code=error["code"], exc_info=why if error["code"] == "INTERNAL" else None)
        lifecycle.fail(session, held.claim, error, RetryPolicy.of(held.resources.settings), done)


def _error_of(why: Exception) -> Json:
    """What the client reads. The text of an unforeseen exception may hold anything, so only its type is told."""
    if isinstance(why, WorkFailed):
        return why.error
    if isinstance(why, PipelineError):
        return {"code": why.code, "detail": str(why), "retryable": why.retryable}
    if isinstance(why, OSError) and why.errno in (errno.ENOSPC, errno.EDQUOT):
        detail = "The worker's disk is full. Free some space, and submit the job again."
        return {"code": "STORAGE_FULL", "detail": detail, "retryable": True}
    if isinstance(why, SQLAlchemyError):
        return {"code": "DATABASE_LOST", "detail": "Postgres went away while the unit ran.", "retryable": True}
    detail = f"The worker failed with {type(why).__name__}; its log says more under this job's id."
    return {"code": "INTERNAL", "detail": detail, "retryable": True}


@contextmanager
def _beating(held: Held) -> Iterator[None]:
    """Beat and watch in a thread, until the body ends."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(held, over), name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(held: Held, over: threading.Event) -> None:
    """Beat in time, look in between whether the work is still wanted, and end a body that does not listen."""
    settings = held.resources.settings
    heard = next_beat = time.monotonic()
    while not over.wait(min(settings.watch_seconds, settings.beat_seconds)):
        now = time.monotonic()
        if draining():
            held.interrupt(Draining())
        if _ask(held, beat=now >= next_beat):
            heard = now
            next_beat = now + settings.beat_seconds if now >= next_beat else next_beat
        if now - heard > settings.give_up_seconds:
            held.interrupt(LeaseLost("No beat could be written for too long."))
        if held.is_overdue() and not over.is_set():
            _end_by_force(held)


def _ask(held: Held, beat: bool) -> bool:
    """Beat, or only look. False: Postgres did not answer."""
    try:
        with held.resources.beats.begin() as session:
            if beat and not lifecycle.beat(session, held.claim, held.resources.settings.lease_seconds):
                standing = lifecycle.Standing(held=False)
            else:
                standing = lifecycle.standing(session, held.claim)
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


def _end_by_force(held: Held) -> None:
    """The body hangs in a call that hears nothing. Its end is written for it, and this process goes, the device's
    memory with it; Celery's pool starts another."""
    log.error("killed_itself", why=type(held.interrupted).__name__)
    _end(held, LeaseLost())
    os.kill(os.getpid(), signal.SIGKILL)
