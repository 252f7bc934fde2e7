"""The Celery tasks: claim the unit, and pass it to its handler."""

import time
import uuid
from typing import Any

from celery import Task
from sqlalchemy.orm import Session

from jobs.queue.leases import Claim, claim_next
from jobs.states import JobKind, Lane
from worker.app import TASK_OF, TRACK, app
from worker.execution.instance import process_name
from worker.execution.resources import resources
from worker.execution.running import holding, running
from worker.execution.signals import draining
from worker.execution.unit import Claiming, UnitLease

RESERVED_SECONDS = 0.5
"""For so long a task continues with units reserved for its worker. Then it ends, so that Flower shows progress."""


@app.task(name=TASK_OF[JobKind.TRAIN], bind=True)
def train(self: "Task[Any, Any]", unit_id: str) -> None:
    """Run a training in its own child process."""
    _run(self, unit_id)


@app.task(name=TASK_OF[JobKind.PREDICT], bind=True)
def predict(self: "Task[Any, Any]", unit_id: str) -> None:
    """Predict a chunk of scans, or explain results; the network stays loaded."""
    _run(self, unit_id)


@app.task(name=TASK_OF[JobKind.INGEST], bind=True)
def ingest(self: "Task[Any, Any]", unit_id: str) -> None:
    """Check an uploaded dataset."""
    _run(self, unit_id)


@app.task(name=TRACK)
def track() -> None:
    """Record in MLflow what it missed while it was away."""
    from worker.tracking.backfill import backfill_runs

    backfill_runs(resources())


def _run(task: "Task[Any, Any]", unit_id: str) -> None:
    """Run the unit, and for a while units reserved in its lane. A draining worker starts nothing: the dispatcher sends
    the unit elsewhere."""
    if draining():
        return
    claim_next = _claim_reserved(task)
    with running(uuid.UUID(unit_id), process_name(), resources(), claim_next) as unit:
        if unit is not None:
            _handle(unit)
    while unit is not None and unit.next_claim is not None:
        with holding(unit.next_claim, resources(), claim_next) as unit:
            _handle(unit)


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
