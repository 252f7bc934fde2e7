"""Who this worker is, and taking back what dead processes of its node still hold.

After a crash a node is started again under its old name. Each start is an instance of its own: what the dead one held
neither makes the new one busy nor has to wait for a lease to expire.
"""

import os
import uuid

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.queue import reaping
from jobs.queue.lifecycle import RetryPolicy
from worker.execution.resources import Resources

WORKER = "RENALQ_WORKER"
"""Environment variable set by a worker's parent process for its children: NODE/INSTANCE."""


def begin_instance(node: str) -> None:
    """Give this start of the node its id. The children inherit it."""
    os.environ[WORKER] = f"{node}/{uuid.uuid4().hex[:8]}"


def worker_name() -> str:
    """NODE/INSTANCE, the name in heartbeats."""
    return os.environ.get(WORKER, "worker/none")


def process_name() -> str:
    """NODE/INSTANCE/PID, the name in claims."""
    return f"{worker_name()}/{os.getpid()}"


def take_back_lost_units(resources: Resources, holders: str) -> int:
    """Requeue, as a failure, each running unit whose holder has died. Returns their number.

    Args:
        holders: whose units: those of this NODE, or of this NODE/INSTANCE.
    """
    retry, units = RetryPolicy.of(resources.settings), 0
    try:
        with resources.autocommit.begin() as session:
            held = reaping.held_by(session, holders)
        for unit_id, fence, worker in held:
            if _is_dead(worker or ""):
                with resources.sessions.begin() as session:
                    units += reaping.take_back(session, unit_id, fence, retry)
    except SQLAlchemyError as error:  # Postgres is away, or the job is locked: their leases expire
        structlog.get_logger().warning("lost_units_not_taken_back", error=type(error).__name__)
    if units:
        structlog.get_logger().warning("lost_units_taken_back", units=units)
    return units


def _is_dead(worker: str) -> bool:
    """Whether a process of this node has ended: any of another instance, and of this one those without a process. The
    process ids of one instance are of one machine."""
    name, _, pid = worker.rpartition("/")
    if name != worker_name():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False
