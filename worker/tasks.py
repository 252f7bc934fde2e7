"""The Celery tasks: claim the unit, and hand it to the room that does it."""

import time
import uuid
from typing import Any

from celery import Task
from sqlalchemy.orm import Session

from jobs.queue.leases import Claim, claim_next
from jobs.states import JobKind, Lane
from worker.app import TASK_OF, TRACK, app, worker_name
from worker.execution.resources import resources
from worker.execution.running import holding, running
from worker.execution.signals import draining
from worker.execution.unit import Claiming, UnitLease

GOES_ON_SECONDS = 0.5
"""A task goes on with units that were promised to its worker for so long; then Flower sees another task."""


@app.task(name=TASK_OF[JobKind.TRAIN], bind=True)
def train(self: "Task[Any, Any]", unit_id: str) -> None:
    """Run a training in a child process of its own."""
    _work_on(self, unit_id)


@app.task(name=TASK_OF[JobKind.PREDICT], bind=True)
def predict(self: "Task[Any, Any]", unit_id: str) -> None:
    """Predict a chunk of scans; the network stays loaded."""
    _work_on(self, unit_id)


@app.task(name=TASK_OF[JobKind.INGEST], bind=True)
def ingest(self: "Task[Any, Any]", unit_id: str) -> None:
    """Check an uploaded dataset."""
    _work_on(self, unit_id)


@app.task(name=TRACK)
def track() -> None:
    """Record in MLflow what it missed while it was away."""
    from worker.tracking.backfill import catch_up

    catch_up(resources())


def _work_on(task: "Task[Any, Any]", unit_id: str) -> None:
    """Do the unit, and for a while what was promised to this lane. While draining nothing new is begun: the dispatcher
    rings again elsewhere."""
    if draining():
        return
    follow = _follow(task)
    with running(uuid.UUID(unit_id), worker_name(task), resources(), follow) as unit:
        if unit is not None:
            _do(unit)
    while unit is not None and unit.following is not None:
        with holding(unit.following, resources(), follow) as unit:
            _do(unit)


def _follow(task: "Task[Any, Any]") -> Claiming:
    """How to claim what was promised to the lane that this task was rung on, for as long as the task may go on."""
    deadline = time.monotonic() + GOES_ON_SECONDS
    delivered: Any = task.request.delivery_info
    lane, worker, lease = Lane(delivered["routing_key"]), worker_name(task), resources().settings.lease_seconds

    def claim(session: Session) -> Claim | None:
        if time.monotonic() > deadline or draining():
            return None
        return claim_next(session, lane, worker, lease)

    return claim


def _do(unit: UnitLease) -> None:
    """Hand the unit to the room that does it. Rooms are imported when first needed: a child that only looks after
    trainings never loads torch."""
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
