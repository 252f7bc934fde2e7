"""Start and end of a Celery worker: logging, its row in `processes`, and the drain flag for its children."""

import ctypes
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from celery import signals
from sqlalchemy.exc import SQLAlchemyError

from jobs import logs
from jobs.queue import processes
from jobs.settings import Settings
from jobs.states import Lane
from worker.execution import instance, weights, workspaces

if TYPE_CHECKING:
    from worker.execution.resources import Resources

DRAIN_FILE = "RENALQ_DRAIN_FILE"
"""Environment variable set by a worker's parent process: its children check whether this file exists. A signal would
reach only the parent."""

PR_SET_PDEATHSIG = 1
_stopping = threading.Event()


def draining() -> bool:
    """Whether this worker should stop."""
    return Path(os.environ[DRAIN_FILE]).exists() if DRAIN_FILE in os.environ else False


def die_with_parent() -> None:
    """On Linux, kill this process when its parent dies, since nothing sends heartbeats any more (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@signals.setup_logging.connect
def _set_up_logging(**_: Any) -> None:
    logs.configure("worker", Settings().log_level)


@signals.worker_init.connect
def _prepare(sender: Any, **_: Any) -> None:
    instance.begin_instance(sender.hostname)
    work = Settings().work
    work.mkdir(parents=True, exist_ok=True)
    os.environ[DRAIN_FILE] = str(work / f"drain-{os.getpid()}")
    Path(os.environ[DRAIN_FILE]).unlink(missing_ok=True)


@signals.worker_ready.connect
def _report_alive(sender: Any, **_: Any) -> None:
    from worker.execution.resources import resources

    lanes = [queue.name for queue in sender.task_consumer.queues]
    sign = processes.Heartbeat(instance.worker_name(), processes.WORKER, lanes)
    opened = resources()  # once: two threads that ask for them at the same time would open them twice
    threading.Thread(target=_keep_alive, args=(opened, sign), name="alive", daemon=True).start()
    if str(Lane.TRAIN) in lanes:
        threading.Thread(target=_report_weights, args=(opened, sign.name), name="weights", daemon=True).start()


def _keep_alive(opened: "Resources", sign: processes.Heartbeat) -> None:
    sign = replace(sign, device=instance.device_name())
    registered = False
    while True:
        try:
            with opened.autocommit.begin() as session:
                (processes.upsert if registered else processes.register)(session, sign)
            if not registered:
                _clean_up_after_predecessors(opened, sign.name.split("/")[0])
            registered = True
        except SQLAlchemyError as error:
            structlog.get_logger().warning("process_heartbeat_failed", error=type(error).__name__)
        if _stopping.wait(opened.settings.process_seconds):
            return


def _report_weights(opened: "Resources", worker: str) -> None:
    """Beside the heartbeats, which must not wait: a file's content is hashed once, and a site may take seconds."""
    while True:
        found = weights.readable(opened.settings.weights)
        try:
            with opened.autocommit.begin() as session:
                processes.report_weights(session, worker, found)
        except SQLAlchemyError as error:
            structlog.get_logger().warning("weights_not_reported", error=type(error).__name__)
        if _stopping.wait(opened.settings.process_seconds):
            return


def _clean_up_after_predecessors(opened: "Resources", node: str) -> None:
    """Take back what earlier instances of this node held, and remove what dead attempts have left on this machine."""
    instance.take_back_lost_units(opened, node)
    opened.sessions.kw["bind"].dispose()  # a parent process needs no other connection than its heartbeat's
    if removed := workspaces.sweep(opened.settings.work, opened.autocommit):
        structlog.get_logger().info("workspaces_removed", count=removed)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    Path(os.environ[DRAIN_FILE]).touch()


@signals.worker_shutdown.connect
def _end(**_: Any) -> None:
    from worker.execution.resources import resources

    _stopping.set()
    Path(os.environ[DRAIN_FILE]).unlink(missing_ok=True)
    try:
        with resources().autocommit.begin() as session:
            processes.deregister(session, instance.worker_name())
    except SQLAlchemyError:
        pass  # the row grows old by itself


@signals.worker_process_init.connect
def _start_child(**_: Any) -> None:
    """If another child was here before, it has died: take back what it held."""
    from worker.execution.resources import resources

    die_with_parent()
    logs.configure("worker", Settings().log_level)
    instance.take_back_lost_units(resources(), instance.worker_name())
