"""The lease of a unit: its transactions, its interrupts, and its end in every case."""

import errno
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from jobs.states import UnitState
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
    """The unit failed: `code` for programs, `detail` for people, and whether a retry may help."""

    def __init__(self, code: str, detail: str, retryable: bool = False) -> None:
        super().__init__(detail)
        self.error: Json = {"code": code, "detail": detail, "retryable": retryable}


@dataclass(frozen=True)
class Ended:
    """How a unit left its worker, for Celery and Flower. Not only failures have a `code`: so does whatever sends the
    unit back to the queue. `FAILED` also of a unit that was written as done, but gave no result at all."""

    state: UnitState = UnitState.SUCCEEDED
    code: str = ""


class UnitLease:
    """A unit under lease. A thread sends its heartbeats; `check()` raises as soon as the work should stop.

    `outcomes` are the finished scans: they are written with the unit's end, however it ends. `next_claim` is the unit
    that was claimed in the transaction that ended this one, if `claim_next` found one. `ended` says how it ended.
    """

    def __init__(self, claim: Claim, resources: Resources, claim_next: Claiming | None = None) -> None:
        self.claim = claim
        self.resources = resources
        self.next_claim: Claim | None = None
        self.ended = Ended(UnitState.QUEUED, "DATABASE_LOST")
        self.warmup_seconds: float | None = None
        """From the claim until the network was loaded; None: it was loaded before, or is not yet."""
        self.claimed_at = time.monotonic()
        self.is_over = False
        """Whether the unit's success is committed: it needs no heartbeat any more."""
        self._claim_next = claim_next or _no_claim
        self.outcomes: list[ScanOutcome] = []
        self._interrupted_at = 0.0
        self._interrupted: Exception | None = None
        self._on_interrupt: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def interrupted(self) -> Exception | None:
        """Why the work should stop, if it should."""
        return self._interrupted

    def check(self) -> None:
        """Return if the work should continue.

        Raises:
            CancelRequested, Draining, Yielding, LeaseLost: the reason to stop.
        """
        if self._interrupted is not None:
            raise self._interrupted

    def when_interrupted(self, stop: Callable[[], None]) -> None:
        """Call `stop` from the heartbeat thread once the work should stop (at once if it already should)."""
        with self._lock:
            self._on_interrupt.append(stop)
            late = self._interrupted is not None
        if late:
            stop()

    def interrupt(self, reason: Exception) -> None:
        """Tell the work to stop. The first reason stays, but a lost lease overrides all others."""
        with self._lock:
            first = self._interrupted is None
            if first or isinstance(reason, LeaseLost):
                self._interrupted = reason
            if first:
                self._interrupted_at = time.monotonic()
            stops = list(self._on_interrupt) if first else []
        for stop in stops:
            stop()

    def report(self, **changes: Any) -> None:
        """`lifecycle.report` in its own transaction. Raises LeaseLost."""
        self.in_transaction(lambda session: lifecycle.report(session, self.claim, **changes))

    def in_transaction(self, action: Callable[[Session], Result], ignore_interrupts: bool = False) -> Result:
        """Run `action` in a transaction, again while Postgres is away: a restart of Postgres loses no work.

        The heartbeat interrupts the unit when the lease is lost. `ignore_interrupts`: continue nevertheless.
        """
        deadline = time.monotonic() + self.resources.settings.give_up_seconds
        while True:
            try:
                with self.resources.sessions.begin() as session:
                    return action(session)
            except SQLAlchemyError as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                log.warning("database_unavailable", error=type(error).__name__)
            if not ignore_interrupts:
                self.check()
            time.sleep(0.2)

    def finish(self, action: Callable[[Session], Ended | None], claim_next: bool = True) -> None:
        """End the unit and claim the next one in one transaction: commits are the main cost of short units.

        `action` ends the unit, and returns how if it did not succeed. Then no other is claimed: Celery's task ends with
        this one, and has its state.
        """

        def end_and_claim(session: Session) -> tuple[Ended, Claim | None]:
            ended = action(session) or Ended()
            succeeded = ended.state == UnitState.SUCCEEDED
            return ended, self._claim_next(session) if claim_next and succeeded else None

        self.ended, self.next_claim = self.in_transaction(end_and_claim, ignore_interrupts=True)
        self.is_over = True

    def workspace(self) -> AbstractContextManager[Path]:
        """A scratch folder, removed at the end. The fence in its name separates attempts."""
        return workspace(self.resources.settings.work, self.claim.unit_id, self.claim.fence)

    def end(self, error: Exception) -> None:
        """Write the state for an exception. If Postgres stays away, the lease expires and the unit is reaped."""
        reason = self._interrupted or error
        try:
            self.ended = self.in_transaction(lambda session: _write_end(session, self, reason), ignore_interrupts=True)
        except LeaseLost:
            self.ended = Ended(UnitState.QUEUED, LeaseLost.code)
            log.warning("lease_lost")
        except SQLAlchemyError as unreachable:
            log.error("end_not_written", error=type(unreachable).__name__)

    def is_overdue(self) -> bool:
        """Whether the work should have stopped long ago, and has not."""
        grace = 2 * self.resources.settings.cancel_grace_seconds
        late = time.monotonic() - self._interrupted_at > grace
        stops = self._interrupted is not None and not isinstance(self._interrupted, Yielding)
        return stops and late and not self.is_over


def _no_claim(session: Session) -> Claim | None:
    return None


def is_away(error: SQLAlchemyError) -> bool:
    """Whether Postgres is away, or a lock timed out: the same may succeed later."""
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _write_end(session: Session, unit: UnitLease, reason: Exception) -> Ended:
    done = list(unit.outcomes)
    if isinstance(reason, LeaseLost):
        raise reason
    if isinstance(reason, CancelRequested):
        lifecycle.confirm_cancel(session, unit.claim, done)
        return Ended(UnitState.CANCELLED, "CANCELLED")
    if isinstance(reason, Draining | Yielding):
        code = "DRAINED" if isinstance(reason, Draining) else "YIELDED"
        lifecycle.requeue(session, unit.claim, code, done)
        return Ended(UnitState.QUEUED, code)
    error = _error_of(reason)
    log.error("unit_failed", code=error["code"], exc_info=reason if error["code"] == "INTERNAL" else None)
    return Ended(
        lifecycle.fail(session, unit.claim, error, RetryPolicy.of(unit.resources.settings), done), error["code"]
    )


def _error_of(reason: Exception) -> Json:
    """The error for clients. The text of an unexpected exception may contain anything, so only its type is shown."""
    if isinstance(reason, WorkFailed):
        return reason.error
    if isinstance(reason, PipelineError):
        return {"code": reason.code, "detail": str(reason), "retryable": reason.retryable}
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
        detail = "The worker's disk is full. Free some space, and submit the job again."
        return {"code": "STORAGE_FULL", "detail": detail, "retryable": True}
    if isinstance(reason, SQLAlchemyError):
        return {"code": "DATABASE_LOST", "detail": "Postgres went away while the unit ran.", "retryable": True}
    detail = f"The worker failed with {type(reason).__name__}; its log says more under this job's id."
    return {"code": "INTERNAL", "detail": detail, "retryable": True}
