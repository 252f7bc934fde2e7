"""Celery as it is mostly used: one task a scan, the network warm in the worker, the answer in the result backend."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from celery import Celery

from ml.image.serving.predictor import Predictor, ScanInput

app = Celery("one-by-one", broker=os.environ["RENALQ_REDIS_URL"], backend=os.environ["RENALQ_REDIS_URL"])
app.conf.update(worker_prefetch_multiplier=4, task_default_queue="one-by-one")


@cache
def predictor() -> Predictor:
    """This process's network."""
    return Predictor.load(Path(os.environ["BENCH_MODEL"]))


@app.task
def predict(path: str) -> dict[str, float]:
    """The probabilities of one scan."""
    return next(predictor().predict([ScanInput("", Path(path))])).probabilities
