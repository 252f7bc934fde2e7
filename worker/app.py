"""The Celery app: queues, routing, and every setting with its reason.

A message carries only a unit's id. A lost, duplicate or late message does no harm: the worker claims the row in
Postgres, and does nothing if that is refused.
"""

from typing import Any

from celery import Celery
from celery.worker.consumer import Consumer
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
"""Backfill of MLflow. It belongs to no unit, and running it twice does no harm."""

EVENTS_DELAY_SECONDS = 0.1

SHOWN_AS = {
    JobKind.TRAIN: "renalq.train",
    JobKind.PREDICT: "renalq.predict",
    JobKind.PREDICT_BATCH: "renalq.predict_batch",
    JobKind.INGEST: "renalq.check_dataset",
}
"""What Flower and Celery's log call a unit's task, by the kind of its job."""
EXPLAIN_SHOWN_AS, TRACK_SHOWN_AS = "renalq.explain", "renalq.backfill_mlflow"

app = Celery("renalq", broker=SETTINGS.redis_url, include=["worker.tasks"])

app.conf.update(
    # Postgres holds the state. With late acknowledgement a task longer than the visibility timeout ran three times.
    task_acks_late=False,
    # Results live in Postgres; Celery's result backend answers PENDING for an unknown id.
    task_ignore_result=True,
    # Messages prefetched by a worker that died were lost to the others.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # The dispatcher retries by itself; Celery's own retry would block it.
    task_publish_retry=False,
    # True would repeat a unit that kills its worker endlessly.
    task_reject_on_worker_lost=False,
    # CUDA cannot be forked, and a spawned child imports only what it needs.
    worker_pool_start_method="spawn",
    worker_concurrency=1,
    # A spawned child imports for seconds on a busy machine; after the default of 4 s it is killed, again and again.
    worker_proc_alive_timeout=60.0,
    # A new child now and then frees leaked memory of native libraries; it loads the network again.
    worker_max_tasks_per_child=10_000,
    # Work continues while Redis is away: it only needs Postgres.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        # kombu waits forever on a dead socket by default.
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # Urgent scans come first where a worker serves several lanes.
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
    # They are sent a little later, so that no task waits for them.
    worker_consumer="worker.app:DelayedEventsConsumer",
    task_track_started=False,
    # Our own JSON lines (worker/execution/signals.py) instead of Celery's.
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    timezone="UTC",
)


def shown_as(kind: JobKind, explains: bool = False) -> str:
    """The name of a unit's task for people."""
    return EXPLAIN_SHOWN_AS if explains else SHOWN_AS[kind]


def publish_unit(task: str, lane: Lane, unit_id: str, job_id: str, shown: str) -> None:
    """Publish a unit's message. `shown`: see `shown_as`.

    Raises:
        kombu.exceptions.OperationalError: Redis cannot be reached.
    """
    ids = {"job_id": job_id, "unit_id": unit_id}  # in this order: Flower's list shows the beginning
    app.send_task(task, kwargs=ids, queue=lane.value, shadow=shown, retry=False, ignore_result=True)


def publish_tracking() -> None:
    """Ask a training worker to backfill MLflow, unless a message for training workers waits already: they are busy, and
    one request for each of a long training's minutes would have to be received before the next training.

    Raises:
        kombu.exceptions.OperationalError: Redis cannot be reached.
    """
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        if channel.queue_declare(Lane.TRAIN.value).message_count:
            return
    app.send_task(TRACK, queue=Lane.TRAIN.value, shadow=TRACK_SHOWN_AS, retry=False, ignore_result=True)


class DelayedEventsConsumer(Consumer):
    """Sends buffered events for Flower a little later, all at once.

    Celery sends them before it passes the task to its process: a round trip to Redis that every unit would wait for.
    """

    _is_scheduled = False

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        """Called for each event that enters the buffer."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self.timer.call_after(EVENTS_DELAY_SECONDS, self._send_events)

    def _send_events(self, *_: Any) -> None:
        self._is_scheduled = False
        dispatcher: Any = getattr(self, "event_dispatcher", None)
        if dispatcher is not None:  # there is none while Redis is away
            dispatcher.flush()
