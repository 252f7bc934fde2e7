"""The Celery tasks: claim the unit, and hand it to the room that does it.

Rooms are imported when first needed: a child that only looks after trainings never loads torch.
"""

import uuid
from typing import Any

from celery import Task

from jobs.states import JobKind
from worker.app import TASK_OF, app, worker_name
from worker.resources import resources
from worker.running import Held, running
from worker.signals import draining


@app.task(name=TASK_OF[JobKind.TRAIN], bind=True)
def train(self: "Task[Any, Any]", unit_id: str) -> None:
    """Run a training in a child process of its own."""
    from worker.train import run_training

    _hold(self, unit_id, run_training)


@app.task(name=TASK_OF[JobKind.PREDICT], bind=True)
def predict(self: "Task[Any, Any]", unit_id: str) -> None:
    """Predict a chunk of scans; the network stays loaded."""
    from worker.predict import predict_chunk

    _hold(self, unit_id, predict_chunk)


@app.task(name=TASK_OF[JobKind.INGEST], bind=True)
def ingest(self: "Task[Any, Any]", unit_id: str) -> None:
    """Check an uploaded dataset."""
    from worker.ingest import check_upload

    _hold(self, unit_id, check_upload)


def _hold(task: "Task[Any, Any]", unit_id: str, work: Any) -> None:
    """Do the work with the unit held. While draining nothing new is begun: the dispatcher rings again elsewhere."""
    if draining():
        return
    with running(uuid.UUID(unit_id), worker_name(task), resources()) as held:
        if isinstance(held, Held):
            work(held)
