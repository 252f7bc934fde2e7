"""What MLflow missed while it was away is recorded from the rows, once it is back.

The rows have parameters, epochs, scores, hashes and files. They do not have single steps, nor the machine's figures.
MLflow's registry follows behind that (`worker.tracking.registry_sync`).
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.results import queries
from jobs.states import JobKind, JobState
from jobs.tables import Artifact, Dataset, Job, Json, ModelVersion
from worker.execution.resources import Resources
from worker.tracking import registry_sync, runs
from worker.tracking.live import PUBLIC
from worker.tracking.provenance import BASE_WEIGHTS
from worker.tracking.runs import WEIGHTS, Description, describe

log = structlog.get_logger()

AT_ONCE = 10
"""Most trainings that one `catch_up` records."""
STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.CANCELLED: "KILLED"}


def is_behind(session: Session) -> bool:
    """Whether an ended training is not, or not wholly, in MLflow, or its registry is behind ours."""
    return session.scalar(_untracked().limit(1)) is not None or registry_sync.is_behind(session)


def mark_tracked(session: Session, job_id: uuid.UUID, run_id: str | None) -> None:
    """Say that MLflow has all of the training, in this run: a slow one may have opened it when the version was made."""
    session.execute(update(Job).where(Job.id == job_id).values(tracked_at=NOW, mlflow_run_id=run_id))
    session.execute(update(ModelVersion).where(ModelVersion.job_id == job_id).values(mlflow_run_id=run_id))


def catch_up(resources: Resources) -> int:
    """Record ended trainings from their rows, and let the registry follow. Returns how many trainings; 0 also where
    MLflow is still away."""
    done = 0
    client = runs.connect(resources.settings.mlflow_url)
    with _patient():
        with resources.sessions.begin() as session:
            job_ids = session.scalars(_untracked().limit(AT_ONCE)).all()
        for job_id in job_ids:
            _record(client, resources, job_id)
            done += 1
    with _patient():  # though a training could not be recorded: somebody may have deleted its run
        registry_sync.mirror(client, resources.sessions)
    return done


@contextmanager
def _patient() -> Iterator[None]:
    """What fails is done at the next look."""
    try:
        yield
    except Exception as error:
        log.warning("mlflow_given_up", error=type(error).__name__)


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
    weights: tuple[str, str | None] | None  # by hash: those that it made, and those that it began with


def _read(session: Session, job_id: uuid.UUID) -> _Rows:
    job = session.get_one(Job, job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    model = session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))
    files = session.execute(select(Artifact.name, Artifact.sha256).where(Artifact.job_id == job_id)).all()
    return _Rows(
        what=_described(job, dataset, model),
        run_id=job.mlflow_run_id,
        state=JobState(job.state),
        metrics=job.metrics,
        epochs=queries.epochs(session, job_id),
        files=[(name, sha256) for name, sha256 in files],
        weights=(model.weights_sha256, model.environment.get(BASE_WEIGHTS)) if model else None,
    )


def _described(job: Job, dataset: Dataset | None, model: ModelVersion | None) -> Description:
    if model is None:
        return describe(job.id, job.params, dataset.digest if dataset else None)
    return describe(job.id, model.params, model.dataset_digest, model.code_revision, model.environment)


def _record(client: Any, resources: Resources, job_id: uuid.UUID) -> None:
    with resources.sessions.begin() as session:
        rows = _read(session, job_id)
    run = runs.open_run(client, rows.what, rows.run_id)
    known = {point.step for point in client.get_metric_history(run, "train_loss")}
    missed = [epoch for epoch in rows.epochs if epoch["epoch"] not in known]
    points = [point for epoch in missed for point in runs.points_of_epoch(epoch)]
    runs.log_points(client, run, [*points, *runs.points_of_scores(rows.metrics or {})])
    if rows.weights:
        runs.log_weights(client, run, *rows.weights)
    _log_files(client, run, resources, rows.files)
    client.set_terminated(run, STATUS.get(rows.state, "FAILED"))
    with resources.sessions.begin() as session:
        mark_tracked(session, job_id, run)
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
