"""Celery as it comes, with Redis: nothing durable, nothing fenced."""

import os

from celery import Celery

from bench.peers.empty import say_now

app = Celery("bare", broker=os.environ["RENALQ_REDIS_URL"])
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=1, task_default_queue="bare")


@app.task
def empty() -> None:
    """Nothing but its first line."""
    say_now()
