"""MLflow runs. MLflow being down, slow or broken never fails or delays a job.

Everything is done by one thread, in order, from a queue. At its first failure the run is given up: the job's own rows
hold all that MLflow would have shown.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from jobs.settings import Settings
from jobs.tables import Json
from ml.events import Epoch

log = structlog.get_logger()

EXPERIMENT = "renalq"
PATIENCE = 120.0
"""Seconds that a worker whose job has succeeded waits for MLflow to take what is left (the weights are 537 MB)."""

Step = Callable[[Any, str], None]


class Run:
    """One training's MLflow run.

    Args:
        started: called from the thread with the run's id, once it is known.
    """

    def __init__(self, settings: Settings, name: str, tags: dict[str, str], started: Callable[[str], None]) -> None:
        self._steps: queue.Queue[Step | None] = queue.Queue()
        self._weights = settings.mlflow_log_weights
        self._url = settings.mlflow_url
        self._open = (name, tags, started)
        self.run_id: str | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self._url:
            self._thread.start()

    def params(self, params: Json) -> None:
        """Log the parameters."""

        def log_all(client: Any, run: str) -> None:
            from mlflow.entities import Param

            client.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])

        self._steps.put(log_all)

    def epoch(self, epoch: Epoch) -> None:
        """Log an epoch's figures at its step."""
        figures = {name: value for name, value in vars(epoch).items() if name not in ("epoch", "epochs")}
        self._metrics(figures, step=epoch.epoch)

    def final(self, metrics: Json) -> None:
        """Log the figures of the evaluation."""
        self._metrics({f"test_{name}": value for name, value in metrics.items()}, step=0)

    def artifacts(self, files: list[Path], weights: Path) -> None:
        """Log files; the weights where the settings want them."""
        for path in [*files, *([weights] if self._weights else [])]:
            self._steps.put(lambda client, run, path=path: client.log_artifact(run, str(path)))  # type: ignore[misc]

    def end(self, status: str, patience: float = 0.0) -> None:
        """Close the run (FINISHED, FAILED or KILLED), and wait so many seconds for MLflow to have taken it all."""
        self._steps.put(lambda client, run: client.set_terminated(run, status))
        self._steps.put(None)
        if self._thread.is_alive():
            self._thread.join(patience)

    def _metrics(self, figures: Json, step: int) -> None:
        numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
        now = int(time.time() * 1000)

        def log_all(client: Any, run: str) -> None:
            from mlflow.entities import Metric

            client.log_batch(run, metrics=[Metric(k, v, now, step) for k, v in numbers.items()])

        self._steps.put(log_all)

    def _work(self) -> None:
        try:
            client, run = self._begin()
            while (step := self._steps.get()) is not None:
                step(client, run)
        except Exception as error:
            log.warning("mlflow_given_up", error=type(error).__name__)

    def _begin(self) -> tuple[Any, str]:
        # MLflow reads these at each request; its defaults would try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        name, tags, started = self._open
        client = MlflowClient(tracking_uri=self._url)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
        self.run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        started(self.run_id)
        return client, self.run_id
