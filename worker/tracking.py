"""MLflow runs. MLflow being down, slow or broken never fails or delays a job.

While a training runs, one thread tells MLflow what happens, in order, from a queue; at its first failure it gives up.
The job's own rows hold all of it: `catch_up` records from them what MLflow missed, once it is back.
"""

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs import queries
from jobs.bookkeeping import NOW
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.tables import Artifact, Dataset, Job, Json, ModelVersion
from ml.events import Epoch
from worker.provenance import code_revision, environment
from worker.resources import Resources

log = structlog.get_logger()

EXPERIMENT = "renalq"
PATIENCE = 120.0
"""Seconds that a worker whose job has succeeded waits for MLflow to take what is left (the weights are 537 MB)."""
AT_ONCE = 10
"""Most trainings that one `catch_up` records."""
PUBLIC = ("scores.json", "history.json", "confusion_matrix.png", "learning_curves.png")
"""What MLflow may show to everybody who can open it. The manifest is not among them: it names files, and files are
named after patients."""
WEIGHTS = "model.safetensors"
STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.CANCELLED: "KILLED"}

Step = Callable[[Any, str], None]


@dataclass(frozen=True)
class Description:
    """What a run says of itself. It is named by the job's id: a name that a client gave may be a patient's."""

    job_id: uuid.UUID
    params: Json
    tags: dict[str, str]


def describe(job_id: uuid.UUID, params: Json, dataset_digest: str | None) -> Description:
    """A run of this code, on this machine."""
    tags = {"renalq.job_id": str(job_id), "mlflow.source.git.commit": code_revision() or "unknown"}
    tags |= {f"environment.{name}": value for name, value in environment().items()}
    return Description(job_id, params, tags | {"renalq.dataset_digest": dataset_digest or ""})


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
        self._weights = settings.mlflow_log_weights
        self._url = settings.mlflow_url
        self._what, self._started = what, started
        self.run_id = run_id
        self.is_complete = False
        """Whether MLflow has taken everything up to a good end."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self._url:
            self._thread.start()

    def epoch(self, epoch: Epoch) -> None:
        """Log an epoch's figures at its step."""
        self._steps.put(lambda client, run: _log_epoch(client, run, vars(epoch)))

    def final(self, metrics: Json) -> None:
        """Log the figures of the evaluation."""
        self._steps.put(lambda client, run: _log_final(client, run, metrics))

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

    def _work(self) -> None:
        try:
            client = _client(self._url)
            self.run_id = _open(client, self._what, self.run_id)
            self._started(self.run_id)
            while (step := self._steps.get()) is not None:
                step(client, self.run_id)
            self.is_complete = True
        except Exception as error:
            log.warning("mlflow_given_up", error=type(error).__name__)


# --- what MLflow missed ---


def is_behind(session: Session) -> bool:
    """Whether an ended training is not, or not wholly, in MLflow."""
    return session.scalar(_untracked().limit(1)) is not None


def mark(session: Session, job_id: uuid.UUID) -> None:
    """Say that MLflow has all of the training."""
    session.execute(update(Job).where(Job.id == job_id).values(tracked_at=NOW))


def catch_up(resources: Resources) -> int:
    """Record ended trainings from their rows. Returns how many; 0 also where MLflow is still away."""
    done = 0
    try:
        client = _client(resources.settings.mlflow_url)
        with resources.sessions.begin() as session:
            job_ids = session.scalars(_untracked().limit(AT_ONCE)).all()
        for job_id in job_ids:
            _record(client, resources, job_id)
            done += 1
    except Exception as error:
        log.warning("mlflow_given_up", error=type(error).__name__)
    return done


def _untracked() -> Any:
    return select(Job.id).where(
        Job.kind == JobKind.TRAIN.value, Job.tracked_at.is_(None), Job.finished_at.is_not(None), Job.attempt > 0
    )


@dataclass(frozen=True)
class _Rows:
    """An ended training, as its rows tell it."""

    what: Description
    run_id: str | None
    state: JobState
    metrics: Json | None
    epochs: Sequence[Json]
    files: Iterable[tuple[str, str]]


def _read(session: Session, job_id: uuid.UUID) -> _Rows:
    job = session.get_one(Job, job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    model = session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))
    files = session.execute(select(Artifact.name, Artifact.sha256).where(Artifact.job_id == job_id)).all()
    return _Rows(
        what=describe(job_id, model.params if model else job.params, dataset.digest if dataset else None),
        run_id=job.mlflow_run_id,
        state=JobState(job.state),
        metrics=job.metrics,
        epochs=queries.epochs(session, job_id),
        files=[(name, sha256) for name, sha256 in files],
    )


def _record(client: Any, resources: Resources, job_id: uuid.UUID) -> None:
    with resources.sessions.begin() as session:
        rows = _read(session, job_id)
    run = _open(client, rows.what, rows.run_id)
    known = {point.step for point in client.get_metric_history(run, "train_loss")}
    for epoch in rows.epochs:
        if epoch["epoch"] not in known:
            _log_epoch(client, run, epoch)
    if rows.metrics:
        _log_final(client, run, rows.metrics)
    _log_files(client, run, resources, rows.files)
    client.set_terminated(run, STATUS.get(rows.state, "FAILED"))
    with resources.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(mlflow_run_id=run))
        session.execute(update(ModelVersion).where(ModelVersion.job_id == job_id).values(mlflow_run_id=run))
        mark(session, job_id)
    log.info("mlflow_caught_up", job_id=str(job_id))


def _log_files(client: Any, run: str, resources: Resources, files: Iterable[tuple[str, str]]) -> None:
    wanted = {*PUBLIC, *([WEIGHTS] if resources.settings.mlflow_log_weights else [])}
    there = {file.path for file in client.list_artifacts(run)}
    with TemporaryDirectory(dir=resources.settings.work) as folder:
        for name, sha256 in files:
            if name in wanted - there:
                link = Path(folder) / name
                link.symlink_to(resources.artifacts.fetch(sha256, Path(folder)))
                client.log_artifact(run, str(link))


# --- MLflow's client ---


def _client(url: str) -> Any:
    # MLflow reads these at each request; its defaults would try for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url)


def _open(client: Any, what: Description, run_id: str | None) -> str:
    """The run's id: of a new run, or of one that is continued."""
    from mlflow.entities import Param

    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    run: str = client.create_run(experiment, run_name=str(what.job_id), tags=what.tags).info.run_id
    client.log_batch(run, params=[Param(name, str(value)) for name, value in what.params.items()])
    return run


def _log_epoch(client: Any, run: str, epoch: Json) -> None:
    figures = {name: value for name, value in epoch.items() if name not in ("epoch", "epochs", "attempt")}
    _log_metrics(client, run, figures, step=epoch["epoch"])


def _log_final(client: Any, run: str, metrics: Json) -> None:
    _log_metrics(client, run, {f"test_{name}": value for name, value in metrics.items()}, step=0)


def _log_metrics(client: Any, run: str, figures: Json, step: int) -> None:
    from mlflow.entities import Metric

    numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    now = int(time.time() * 1000)
    client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])
