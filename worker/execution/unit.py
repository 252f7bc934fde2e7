"""`with running(unit_id)`: claim, heartbeat, cancel and drain watch, exception → state. The only place that does so."""

import errno
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from jobs.errors import LeaseLost
from jobs.queue import lifecycle
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.outcomes import ScanOutcome
from jobs.tables import Json
from ml.runtime.errors import PipelineError
from worker.execution.resources import Resources
from worker.execution.workspaces import workspace

log = structlog.get_logger()
Result = TypeVar("Result")
Claiming = Callable[[Session], Claim | None]
"""A way to claim: a function of `jobs.queue.leases` with all arguments but the session given."""


class CancelRequested(Exception):
    """A client asked for the job's end."""


class Draining(Exception):
    """This worker is shutting down: the unit goes back to the queue."""


class Yielding(Exception):
    """A tenant with a higher claim waits for this worker: the rest of the unit goes back to the queue."""


class WorkFailed(Exception):
    """The unit cannot be done: `code` for programs, `detail` for people, and whether another try may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.error: Json = {"code": code, "detail": detail, "retryable": retryable}


class UnitLease:
    """A unit under lease. A thread beats for it; `check()` raises as soon as the work is to stop.

    `outcomes` are the scans that are done: whatever ends the unit, they are written with its end. `following` is the
    unit that was claimed in the transaction that ended this one, if `claim_next` found any.
    """

    def __init__(self, claim: Claim, resources: Resources, claim_next: Claiming | None = None) -> None:
        self.claim = claim
        self.resources = resources
        self.following: Claim | None = None
        self.is_over = False
        """Whether the unit's good end is committed: there is nothing to beat for any more."""
        self._claim_next = claim_next or _nothing
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

    def in_transaction(self, verb: Callable[[Session], Result], to_the_end: bool = False) -> Result:
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

    def finish(self, verb: Callable[[Session], object], and_follow: bool = True) -> None:
        """End the unit well, and claim the next one, in one transaction: for short units the commits are the cost."""

        def both(session: Session) -> Claim | None:
            verb(session)
            return self._claim_next(session) if and_follow else None

        self.following = self.in_transaction(both, to_the_end=True)
        self.is_over = True

    def workspace(self) -> AbstractContextManager[Path]:
        """A scratch folder, removed at the end. The fence in its name keeps two attempts apart."""
        return workspace(self.resources.settings.work, self.claim.unit_id, self.claim.fence)

    def end(self, error: Exception) -> None:
        """Exception → state. A database that stays away leaves the unit to the reaper: its lease runs out by itself."""
        why = self._interrupted or error
        try:
            self.in_transaction(lambda session: _write_end(session, self, why), to_the_end=True)
        except LeaseLost:
            log.warning("lease_lost")
        except SQLAlchemyError as unreachable:
            log.error("end_not_written", error=type(unreachable).__name__)

    def is_overdue(self) -> bool:
        """Whether the work was told to stop and has not, for longer than is asked of it."""
        patience = 2 * self.resources.settings.cancel_grace_seconds
        late = time.monotonic() - self._interrupted_at > patience
        stops = self._interrupted is not None and not isinstance(self._interrupted, Yielding)
        return stops and late and not self.is_over


def _nothing(session: Session) -> Claim | None:
    return None


def is_away(error: SQLAlchemyError) -> bool:
    """Whether Postgres went away, or gave up on a lock: the same may succeed in a while."""
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _write_end(session: Session, unit: UnitLease, why: Exception) -> None:
    done = list(unit.outcomes)
    if isinstance(why, LeaseLost):
        raise why
    if isinstance(why, CancelRequested):
        lifecycle.confirm_cancel(session, unit.claim, done)
    elif isinstance(why, Draining | Yielding):
        lifecycle.requeue(session, unit.claim, "DRAINED" if isinstance(why, Draining) else "YIELDED", done)
    else:
        error = _error_of(why)
        log.error("unit_failed", code=error["code"], exc_info=why if error["code"] == "INTERNAL" else None)
        lifecycle.fail(session, unit.claim, error, RetryPolicy.of(unit.resources.settings), done)


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
