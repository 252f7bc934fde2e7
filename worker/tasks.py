"""The Celery tasks: claim the unit, and pass it to its handler.

Celery and Flower learn how it ended, and nothing follows from that: the row decides what happens next. A task that
fails or is retried was acknowledged at its start, and nobody publishes it again but the dispatcher.
"""

import time
import uuid
from typing import Any

from celery import Task
from celery.exceptions import Retry, Terminated
from sqlalchemy.orm import Session

from jobs.queue.leases import Claim, claim_next
from jobs.states import JobKind, Lane, UnitState
from worker.app import TASK_OF, TRACK, app
from worker.execution.instance import process_name
from worker.execution.resources import resources
from worker.execution.running import holding, running
from worker.execution.signals import draining
from worker.execution.unit import Claiming, UnitLease

RESERVED_SECONDS = 0.5
"""For so long a task continues with units reserved for its worker. Then it ends, so that Flower shows progress."""


class UnitFailed(Exception):
    """The unit has failed for good. The text holds a code and ids."""


class UnitRequeued(Exception):
    """The unit went back to the queue. The text holds a code and ids."""


EXPECTED = (UnitFailed, Terminated)
"""Celery logs these as they are, without a traceback: our own log has said what happened."""


@app.task(name=TASK_OF[JobKind.TRAIN], bind=True, throws=EXPECTED)
def train(self: "Task[Any, Any]", unit_id: str, job_id: str = "") -> str:
    """Run a training in its own child process."""
    return _run(self, unit_id, job_id)


@app.task(name=TASK_OF[JobKind.PREDICT], bind=True, throws=EXPECTED)
def predict(self: "Task[Any, Any]", unit_id: str, job_id: str = "") -> str:
    """Predict a chunk of scans, or explain results; the network stays loaded."""
    return _run(self, unit_id, job_id)


@app.task(name=TASK_OF[JobKind.INGEST], bind=True, throws=EXPECTED)
def ingest(self: "Task[Any, Any]", unit_id: str, job_id: str = "") -> str:
    """Check an uploaded dataset."""
    return _run(self, unit_id, job_id)


@app.task(name=TRACK)
def track() -> None:
    """Record in MLflow what it missed while it was away."""
    from worker.tracking.backfill import backfill_runs

    backfill_runs(resources())


def _run(task: "Task[Any, Any]", unit_id: str, job_id: str) -> str:
    """Run the unit, and for a while units reserved in its lane. A draining worker starts nothing: the dispatcher sends
    the unit elsewhere.

    Raises:
        UnitFailed, Retry, Terminated: how the last unit ended, if it did not succeed; only the last one may not.
    """
    if draining():
        raise _retry(f"DRAINED: unit {unit_id} of job {job_id} was not begun")
    claim_next, units = _claim_reserved(task), 1
    with running(uuid.UUID(unit_id), process_name(), resources(), claim_next) as unit:
        if unit is not None:
            _handle(unit)
    if unit is None:
        raise Terminated(f"NOT_CLAIMED: unit {unit_id} of job {job_id} is cancelled, done, or in other hands")
    while unit.next_claim is not None:
        units += 1
        with holding(unit.next_claim, resources(), claim_next) as unit:
            _handle(unit)
    return _told(unit, units)


def _told(unit: UnitLease, units: int) -> str:
    """What Flower shows: SUCCESS with the number of units, FAILURE, RETRY, or for what was cancelled REVOKED, the state
    of a task that was terminated on request."""
    ended, claim = unit.ended, unit.claim
    text = f"{ended.code}: unit {claim.unit_id} of job {claim.job_id}, attempt {claim.attempt}"
    match ended.state:
        case UnitState.SUCCEEDED:
            return f"units: {units}"
        case UnitState.FAILED:
            raise UnitFailed(text)
        case UnitState.CANCELLED:
            raise Terminated(text)
        case _:
            raise _retry(text)


def _retry(text: str) -> Retry:
    """Only the state: Celery publishes nothing, since `Task.retry` was not called."""
    return Retry(text, UnitRequeued(text))


def _claim_reserved(task: "Task[Any, Any]") -> Claiming:
    """Claims units reserved in the task's lane, until the task should end."""
    deadline = time.monotonic() + RESERVED_SECONDS
    delivered: Any = task.request.delivery_info
    lane, worker, lease = Lane(delivered["routing_key"]), process_name(), resources().settings.lease_seconds

    def claim(session: Session) -> Claim | None:
        if time.monotonic() > deadline or draining():
            return None
        return claim_next(session, lane, worker, lease)

    return claim


def _handle(unit: UnitLease) -> None:
    """Pass the unit to its handler. Handlers are imported when first needed: a process that only supervises trainings
    never loads torch."""
    match unit.claim.kind:
        case JobKind.TRAIN:
            from worker.handlers.train import run_training

            run_training(unit)
        case JobKind.INGEST:
            from worker.handlers.ingest import check_upload

            check_upload(unit)
        case _ if unit.claim.explains:
            from worker.handlers.explain import explain_results

            explain_results(unit)
        case _:
            from worker.handlers.predict import predict_chunk

            predict_chunk(unit)
