"""`with running(unit_id)`: claim, heartbeat, cancel and drain watch, exception → state. The only place that does so."""

import errno
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from jobs import lifecycle
from jobs.errors import LeaseLost
from jobs.lifecycle import Claim
from jobs.settings import Settings
from jobs.tables import Json
from worker.resources import Resources
from worker.signals import draining

log = structlog.get_logger()


class WorkFailed(Exception):
    """The unit cannot be done: `code` for programs, `detail` for people, and whether another try may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.error: Json = {"code": code, "detail": detail, "retryable": retryable}


class CancelRequested(Exception):
    """Somebody asked for the job's end."""


class Draining(Exception):
    """This worker is to stop: the unit goes back to the queue."""


class Held:
    """A unit under lease. A thread beats for it; `check()` raises as soon as the work is to stop."""

    def __init__(self, claim: Claim, resources: Resources) -> None:
        self.claim = claim
        self.resources = resources
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
            CancelRequested, Draining, LeaseLost
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
            stops = list(self._on_interrupt) if first else []
        for stop in stops:
            stop()

    def report(self, **said: Any) -> None:
        """`lifecycle.report` in a transaction of its own. Raises LeaseLost."""
        with self.transaction() as session:
            lifecycle.report(session, self.claim, **said)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A transaction, tried by the caller's own means: nothing here repeats it."""
        with self.resources.sessions.begin() as session:
            yield session

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A scratch folder, removed at the end. The fence in its name keeps two attempts apart."""
        root = self.resources.settings.work
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{self.claim.job_id}-{self.claim.fence}-", dir=root)
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(unit_id: uuid.UUID, worker: str, resources: Resources) -> Iterator[Held | None]:
    """Hold the unit while the body runs; None where the claim is refused.

    The body ends the unit well by itself, in one transaction with its results (`lifecycle.succeed`). Whatever else
    ends the body becomes a state here.
    """
    with resources.sessions.begin() as session:
        claim = lifecycle.claim(session, unit_id, worker, resources.settings.lease_seconds)
    if claim is None:
        log.info("claim_refused", unit_id=str(unit_id))
        yield None
        return
    held = Held(claim, resources)
    structlog.contextvars.bind_contextvars(job_id=str(claim.job_id), unit_id=str(unit_id), attempt=claim.attempt)
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


def _end(held: Held, error: Exception) -> None:
    """Exception → state. A database that is away leaves the unit to the reaper: its lease runs out by itself."""
    why = held.interrupted or error
    try:
        with held.transaction() as session:
            _write_end(session, held, why)
    except LeaseLost:
        log.warning("lease_lost")
    except SQLAlchemyError as unreachable:
        log.error("end_not_written", error=type(unreachable).__name__)


def _write_end(session: Session, held: Held, why: Exception) -> None:
    settings = held.resources.settings
    if isinstance(why, LeaseLost):
        raise why
    if isinstance(why, CancelRequested):
        lifecycle.cancelled(session, held.claim)
    elif isinstance(why, Draining):
        lifecycle.requeue(session, held.claim, "DRAINED")
    else:
        error = _error_of(why)
        log.error("unit_failed", code=error["code"], exc_info=why if error["code"] == "INTERNAL" else None)
        backoff = full_jitter(held.claim.attempt, settings)
        lifecycle.fail(session, held.claim, error, max_failures=settings.max_failures, backoff=backoff)


def _error_of(why: Exception) -> Json:
    """What the client reads. The text of an unforeseen exception may hold anything, so only its type is told."""
    if isinstance(why, WorkFailed):
        return why.error
    if isinstance(why, OSError) and why.errno in (errno.ENOSPC, errno.EDQUOT):
        detail = "The worker's disk is full. Free some space, and submit the job again."
        return {"code": "STORAGE_FULL", "detail": detail, "retryable": True}
    if isinstance(why, SQLAlchemyError):
        return {"code": "DATABASE_LOST", "detail": "Postgres went away while the unit ran.", "retryable": True}
    detail = f"The worker failed with {type(why).__name__}; its log says more under this job's id."
    return {"code": "INTERNAL", "detail": detail, "retryable": True}


def full_jitter(attempt: int, settings: Settings) -> float:
    """Seconds to wait after a failure: evenly between 0 and a doubling bound, so that retries never march in step."""
    return random.uniform(0, min(settings.retry_cap_seconds, settings.retry_base_seconds * 2 ** (attempt - 1)))


@contextmanager
def _beating(held: Held) -> Iterator[None]:
    """Beat and watch in a thread, until the body ends."""
    over = threading.Event()
    thread = threading.Thread(target=_beat_until, args=(held, over), name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beat_until(held: Held, over: threading.Event) -> None:
    settings = held.resources.settings
    heard = next_beat = time.monotonic()
    while not over.wait(min(0.5, settings.beat_seconds)):
        if draining():
            held.interrupt(Draining())
        now = time.monotonic()
        if now >= next_beat:
            next_beat = now + settings.beat_seconds
            heard = now if _beat(held) else heard
        if now - heard > settings.give_up_seconds:
            held.interrupt(LeaseLost("No beat could be written for too long."))
            return


def _beat(held: Held) -> bool:
    """One beat. False: Postgres did not answer."""
    try:
        with held.resources.beats.begin() as session:
            standing = lifecycle.beat(session, held.claim, held.resources.settings.lease_seconds)
    except SQLAlchemyError as error:
        log.warning("beat_failed", error=type(error).__name__)
        return False
    if not standing.held:
        held.interrupt(LeaseLost())
    elif standing.cancel_requested:
        held.interrupt(CancelRequested())
    return True
