"""MLflow runs. MLflow being down, slow or broken never fails or delays a job.

While a training runs, one thread tells MLflow what happens, in order, from a queue; at its first failure it gives up.
The job's own rows hold all of it but single steps and the machine's figures: `worker/tracking/backfill.py` records
from them what MLflow missed, once it is back.
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
from ml.runtime.events import Epoch, Steps
from worker.tracking import runs
from worker.tracking.runs import METRICS_AT_ONCE, Description, Point
from worker.tracking.system_metrics import Machine

log = structlog.get_logger()

END_TIMEOUT_SECONDS = 120.0
"""Seconds that a worker whose job has succeeded waits for MLflow to take what is left (the weights are 537 MB)."""
SAMPLE_SECONDS = 10.0
"""Seconds between two looks at the machine; with each, the steps since the last are logged."""
PUBLIC = (
    *("scores.json", "history.json", "dataset_report.json", "learning_curves.png", "confusion_matrix.png"),
    *("roc.png", "pr.png", "reliability.png"),
)
"""What MLflow may show to everybody who can open it: figures and curves. The manifest is not among them, it names
files, and files are named after patients; nor are the mistakes and the report, which show scans."""

Step = Callable[[Any, str], None]


class Run:
    """One training's MLflow run, told by a thread.

    Args:
        started: called from the thread with the run's id, once it is known.
        run_id: the run of an attempt before this one: it is continued.
    """

    def __init__(
        self, settings: Settings, what: Description, started: Callable[[str], None], run_id: str | None = None
    ) -> None:
        self._steps: queue.Queue[Step | None] = queue.Queue()
        self._points: list[Point] = []  # the thread's own, like the times below: what the next call will log
        self._system_metrics = Machine()
        self._began = self._next_look = 0.0
        self._weights = settings.mlflow_log_weights
        self._url = settings.mlflow_url
        self._what, self._started = what, started
        self.run_id = run_id
        self.is_complete = False
        """Whether MLflow has taken everything up to a good end."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self._url:
            self._thread.start()

    def measure(self, pid: int | None) -> None:
        """Measure what this process uses, from now on."""
        self._system_metrics.watch(pid)

    def log_steps(self, steps: Steps) -> None:
        """Log the losses of single steps, many in one call."""
        points = runs.points_of_steps(steps)
        self._say(lambda client, run: self._points.extend(points))

    def log_epoch(self, epoch: Epoch) -> None:
        """Log an epoch's figures at its number."""
        points = runs.points_of_epoch(vars(epoch))
        self._say(lambda client, run: runs.log_points(client, run, points))

    def log_scores(self, metrics: Json) -> None:
        """Log the figures of the evaluation."""
        points = runs.points_of_scores(metrics)
        self._say(lambda client, run: runs.log_points(client, run, points))

    def log_artifacts(self, files: dict[str, Path], weights: Path) -> None:
        """Log those of the files that are public; the weights where the settings want them."""
        public = [files[name] for name in PUBLIC if name in files]
        for path in [*public, *([weights] if self._weights else [])]:
            self._say(lambda client, run, path=path: client.log_artifact(run, str(path)))  # type: ignore[misc]

    def log_weights(self, dataset_digest: str, weights_sha256: str, base_sha256: str | None) -> None:
        """Say by hash what was trained on, what came of it, and what it began with."""
        self._say(lambda client, run: runs.log_weights(client, run, weights_sha256, base_sha256))
        if self._what.dataset_digest is None:
            self._say(lambda client, run: runs.log_dataset(client, run, dataset_digest))

    def end(self, status: str, patience: float = 0.0) -> None:
        """Close the run (FINISHED, FAILED or KILLED), and wait so many seconds for MLflow to have taken it all."""
        self._say(self._look)
        self._say(lambda client, run: client.set_terminated(run, status))
        self._steps.put(None)
        if self._thread.is_alive():
            self._thread.join(patience)

    def _say(self, step: Step) -> None:
        if self._thread.is_alive():  # nobody takes anything from the queue of a thread that has given up
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
            log.warning("mlflow_given_up", error=type(error).__name__)

    def _next(self) -> Step | None:
        """What is to be told next; a look at the machine when it is time for one."""
        try:
            left = self._next_look - time.monotonic()
            return self._steps.get(timeout=left) if left > 0 else self._look
        except queue.Empty:
            return self._look

    def _look(self, client: Any, run: str) -> None:
        self._next_look = time.monotonic() + SAMPLE_SECONDS
        # Seconds since the run began: an attempt that continues it goes on with the numbers of the one before.
        at, second = runs.now(), max(0, int(time.time() - self._began))
        self._points += [Point(name, value, second, at) for name, value in self._system_metrics.sample().items()]
        self._log_points(client, run)

    def _log_points(self, client: Any, run: str) -> None:
        points, self._points = self._points, []
        runs.log_points(client, run, points)
