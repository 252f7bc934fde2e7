"""The Celery app: queues, routing, and every setting with its reason.

A message only rings a doorbell: it carries a unit's id, and losing, doubling or delaying it does no harm, since the
worker claims the row in Postgres or goes back to sleep.
"""

import os
from typing import Any

from celery import Celery, Task
from kombu import Queue

from jobs.settings import Settings
from jobs.states import JobKind, Lane

SETTINGS = Settings()

TASK_OF = {
    JobKind.TRAIN: "renalq.train",
    JobKind.PREDICT: "renalq.predict",
    JobKind.PREDICT_BATCH: "renalq.predict",
    JobKind.INGEST: "renalq.ingest",
}

TRACK = "renalq.track"
"""Records in MLflow what it missed. It belongs to no unit, and doing it twice does no harm."""

app = Celery("renalq", broker=SETTINGS.redis_url, include=["worker.tasks"])

app.conf.update(
    # The message only rings. With late acknowledgement a task longer than the visibility timeout ran three times.
    task_acks_late=False,
    # Results live in Postgres; Celery's result backend answers PENDING for an unknown id.
    task_ignore_result=True,
    # A prefetched message of a worker that died was lost to the others.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # The dispatcher retries, and knows how to wait; Celery's own retry would block it.
    task_publish_retry=False,
    # True would loop a unit that kills its worker without end.
    task_reject_on_worker_lost=False,
    # CUDA cannot be forked; a spawned child has imported nothing that it does not need.
    worker_pool_start_method="spawn",
    worker_concurrency=1,
    # A new child now and then gives leaked memory of native libraries back; the network is loaded anew then.
    worker_max_tasks_per_child=10_000,
    # Work goes on while Redis is away: it needs Postgres only.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        # kombu's default waits for ever on a socket whose peer has vanished.
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # Urgent scans first where a worker serves several lanes.
        "queue_order_strategy": "priority",
    },
    # JSON only: a pickle from Redis would run code. Ids only: arguments are readable in Redis and in Flower.
    accept_content=["json"],
    task_serializer="json",
    task_default_queue=Lane.BATCH.value,
    task_queues=[Queue(lane.value) for lane in Lane],
    task_create_missing_queues=False,
    # Flower shows tasks as they come and go.
    worker_send_task_events=True,
    # … a tenth of a second later, so that no task waits for them.
    worker_consumer="worker.consumer:EventsLater",
    task_track_started=False,
    # Our own JSON lines (worker/execution/signals.py) instead of Celery's.
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    timezone="UTC",
)


def ring(task: str, lane: Lane, unit_id: str) -> None:
    """Publish a unit's doorbell. Raises kombu's OperationalError where Redis cannot be reached."""
    app.send_task(task, kwargs={"unit_id": unit_id}, queue=lane.value, retry=False, ignore_result=True)


def ring_tracking() -> None:
    """Ask a training worker to record what MLflow missed. Raises kombu's OperationalError."""
    app.send_task(TRACK, queue=Lane.TRAIN.value, retry=False, ignore_result=True)


def worker_name(task: Task[Any, Any]) -> str:
    """The name that claims carry: the Celery worker's and the process's."""
    return f"{task.request.hostname or 'worker'}/{os.getpid()}"
