"""Backfill of MLflow from the rows: what it missed while it was away is recorded once it is back.

The rows have parameters, epochs, scores, hashes and files, but neither single steps nor system metrics. After the
runs, MLflow's registry is synchronized (`worker.tracking.registry_sync`).
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
from ml.spec.registry import spec_of
from worker.execution.resources import Resources
from worker.tracking import registry_sync, runs
from worker.tracking.provenance import BASE_WEIGHTS
from worker.tracking.runs import Description, describe

log = structlog.get_logger()

BATCH_SIZE = 10
"""Trainings that one `backfill_runs` records at most."""
STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.CANCELLED: "KILLED"}


def is_behind(session: Session) -> bool:
    """Whether an ended training is missing or incomplete in MLflow, or its registry is behind."""
    return session.scalar(_untracked_jobs().limit(1)) is not None or registry_sync.is_behind(session)


def mark_tracked(session: Session, job_id: uuid.UUID, run_id: str | None) -> None:
    """Record that MLflow has the whole training, and in which run: a slow MLflow may have opened it late."""
    session.execute(update(Job).where(Job.id == job_id).values(tracked_at=NOW, mlflow_run_id=run_id))
    session.execute(update(ModelVersion).where(ModelVersion.job_id == job_id).values(mlflow_run_id=run_id))


def backfill_runs(resources: Resources) -> int:
    """Record ended trainings from their rows, then synchronize the registry. Returns the number of trainings; 0 also
    if MLflow is still away."""
    done = 0
    client = runs.connect(resources.settings.mlflow_url)
    with _log_and_continue():
        with resources.sessions.begin() as session:
            job_ids = session.scalars(_untracked_jobs().limit(BATCH_SIZE)).all()
        for job_id in job_ids:
            _record(client, resources, job_id)
            done += 1
    with _log_and_continue():  # also if a training failed: its run may have been deleted
        registry_sync.sync_registry(client, resources.sessions)
    return done


@contextmanager
def _log_and_continue() -> Iterator[None]:
    """Log an error and continue: the next call tries again."""
    try:
        yield
    except Exception as error:
        log.warning("mlflow_backfill_failed", error=type(error).__name__)


def _untracked_jobs() -> Any:
    return select(Job.id).where(
        Job.kind == JobKind.TRAIN.value, Job.tracked_at.is_(None), Job.finished_at.is_not(None), Job.attempt > 0
    )


@dataclass(frozen=True)
class _TrainingRows:
    """An ended training, read from its rows."""

    what: Description
    run_id: str | None
    state: JobState
    metrics: Json | None
    epochs: Sequence[Json]
    files: Iterable[tuple[str, str]]
    weights: tuple[str, str | None] | None  # hashes of the new weights and of those it started from


def _read(session: Session, job_id: uuid.UUID) -> _TrainingRows:
    job = session.get_one(Job, job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    model = session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))
    files = session.execute(select(Artifact.name, Artifact.sha256).where(Artifact.job_id == job_id)).all()
    return _TrainingRows(
        what=_described(job, dataset, model),
        run_id=job.mlflow_run_id,
        state=JobState(job.state),
        metrics=job.metrics,
        epochs=queries.epochs(session, job_id),
        files=[(name, sha256) for name, sha256 in files],
        weights=(model.weights_sha256, model.environment.get(BASE_WEIGHTS)) if model else None,
    )


def _described(job: Job, dataset: Dataset | None, model: ModelVersion | None) -> Description:
    spec = spec_of(job.pipeline)
    if model is None:
        return describe(spec, job.id, job.params, dataset.digest if dataset else None)
    return describe(spec, job.id, model.params, model.dataset_digest, model.code_revision, model.environment)


def _record(client: Any, resources: Resources, job_id: uuid.UUID) -> None:
    with resources.sessions.begin() as session:
        rows = _read(session, job_id)
    run = runs.open_run(client, rows.what, rows.run_id)
    known = {point.step for point in client.get_metric_history(run, "train_loss")}
    missed = [epoch for epoch in rows.epochs if epoch["epoch"] not in known]
    points = [point for epoch in missed for point in runs.points_of_epoch(epoch, rows.what.spec.phases)]
    runs.log_points(client, run, [*points, *runs.points_of_scores(rows.metrics or {})])
    if rows.weights:
        runs.log_weights(client, run, *rows.weights)
    _log_files(client, run, resources, rows)
    client.set_terminated(run, STATUS.get(rows.state, "FAILED"))
    with resources.sessions.begin() as session:
        mark_tracked(session, job_id, run)
    log.info("mlflow_backfilled", job_id=str(job_id))


def _log_files(client: Any, run: str, resources: Resources, rows: _TrainingRows) -> None:
    spec = rows.what.spec
    wanted = {*spec.public_artifacts, *([spec.model_file] if resources.settings.mlflow_log_weights else [])}
    there = {file.path for file in client.list_artifacts(run)}
    with TemporaryDirectory(dir=resources.settings.work) as folder:
        for name, sha256 in rows.files:
            if name in wanted - there:
                link = Path(folder) / name
                link.symlink_to(resources.artifacts.fetch(sha256, Path(folder)))
                client.log_artifact(run, str(link))
