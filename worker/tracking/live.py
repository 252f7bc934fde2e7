"""Live MLflow runs. An MLflow that is down, slow or broken never fails or delays a job.

While a training runs, one thread sends what happens to MLflow, in order, from a queue; at its first failure it stops.
The job's own rows hold all of it except single steps and system metrics: `worker/tracking/backfill.py` records from
them what MLflow missed, once it is back.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from jobs.settings import Settings
from jobs.tables import Json
from ml.runtime.events import Epoch, Round, Steps
from worker.tracking import runs
from worker.tracking.runs import METRICS_AT_ONCE, Description, Point
from worker.tracking.system_metrics import SystemMetrics

log = structlog.get_logger()

END_TIMEOUT_SECONDS = 120.0
"""Seconds that a worker waits after a succeeded training for MLflow to take the rest (VGG16's weights: 537 MB)."""
SAMPLE_SECONDS = 10.0
"""Seconds between two samples of system metrics; with each, the steps since the last one are logged."""
Step = Callable[[Any, str], None]


class Run:
    """One training's MLflow run, written by a thread.

    Args:
        started: called from the thread with the run's id, once it is known.
        run_id: the run of an earlier attempt, to continue.
    """

    def __init__(
        self, settings: Settings, what: Description, started: Callable[[str], None], run_id: str | None = None
    ) -> None:
        self._steps: queue.Queue[Step | None] = queue.Queue()
        self._points: list[Point] = []  # for the next call; used by the thread only, like the times below
        self._system_metrics = SystemMetrics()
        self._began = self._next_sample = 0.0
        self._weights = settings.mlflow_log_weights
        self._url = settings.mlflow_url
        self._what, self._started = what, started
        self.run_id = run_id
        self.is_complete = False
        """Whether MLflow has everything, and the training succeeded."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self._url:
            self._thread.start()

    def measure(self, pid: int | None) -> None:
        """Measure this process from now on."""
        self._system_metrics.measure(pid)

    def log_steps(self, steps: Steps) -> None:
        """Log the losses of single steps, many in one call."""
        points = runs.points_of_steps(steps)
        self._enqueue(lambda client, run: self._points.extend(points))

    def log_epoch(self, epoch: Epoch | Round) -> None:
        """Log an epoch's figures at its number."""
        points = runs.points_of_epoch(epoch.row(), self._what.spec.phases)
        self._enqueue(lambda client, run: runs.log_points(client, run, points))

    def log_scores(self, metrics: Json) -> None:
        """Log the figures of the evaluation."""
        points = runs.points_of_scores(metrics)
        self._enqueue(lambda client, run: runs.log_points(client, run, points))

    def log_artifacts(self, files: dict[str, Path], weights: Path) -> None:
        """Log the public files, and the weights if the settings say so."""
        public = [files[name] for name in self._what.spec.public_artifacts if name in files]
        for path in [*public, *([weights] if self._weights else [])]:
            self._enqueue(lambda client, run, path=path: client.log_artifact(run, str(path)))  # type: ignore[misc]

    def log_weights(self, dataset_digest: str, weights_sha256: str, base_sha256: str | None) -> None:
        """Log the digest of the dataset and the hashes of the weights: the new ones and those it started from."""
        self._enqueue(lambda client, run: runs.log_weights(client, run, weights_sha256, base_sha256))
        if self._what.dataset_digest is None:
            self._enqueue(lambda client, run: runs.log_dataset(client, run, dataset_digest))

    def end(self, status: str, wait_seconds: float = 0.0) -> None:
        """Close the run (FINISHED, FAILED or KILLED), and wait for MLflow to have everything."""
        self._enqueue(self._sample)
        self._enqueue(lambda client, run: client.set_terminated(run, status))
        self._steps.put(None)
        if self._thread.is_alive():
            self._thread.join(wait_seconds)

    def _enqueue(self, step: Step) -> None:
        if self._thread.is_alive():  # a thread that has stopped takes nothing from its queue
            self._steps.put(step)

    # --- the thread ---

    def _work(self) -> None:
        try:
            client = runs.connect(self._url)
            self.run_id = runs.open_run(client, self._what, self.run_id)
            self._began = client.get_run(self.run_id).info.start_time / 1000
            self._started(self.run_id)
            while (step := self._next()) is not None:
                step(client, self.run_id)
                if len(self._points) >= METRICS_AT_ONCE:
                    self._log_points(client, self.run_id)
            self.is_complete = True
        except Exception as error:
            log.warning("mlflow_run_stopped", error=type(error).__name__)

    def _next(self) -> Step | None:
        """The next step from the queue, or a sample of system metrics when one is due."""
        try:
            left = self._next_sample - time.monotonic()
            return self._steps.get(timeout=left) if left > 0 else self._sample
        except queue.Empty:
            return self._sample

    def _sample(self, client: Any, run: str) -> None:
        self._next_sample = time.monotonic() + SAMPLE_SECONDS
        # Seconds since the run began, so that a later attempt continues the series.
        at, second = runs.now(), max(0, int(time.time() - self._began))
        self._points += [Point(name, value, second, at) for name, value in self._system_metrics.sample().items()]
        self._log_points(client, run)

    def _log_points(self, client: Any, run: str) -> None:
        points, self._points = self._points, []
        runs.log_points(client, run, points)
