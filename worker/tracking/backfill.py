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
from sqlalchemy import ColumnElement, Select, and_, or_, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.results import queries
from jobs.states import JobKind, JobState
from jobs.tables import Artifact, Dataset, Job, Json, ModelVersion
from ml.spec.registry import spec_of
from worker.execution.resources import Resources
from worker.tracking import registry_sync, run_deletion, runs
from worker.tracking.provenance import BASE_WEIGHTS
from worker.tracking.runs import Description, describe

log = structlog.get_logger()

BATCH_SIZE = 10
"""Trainings that one `backfill_runs` records at most."""
MAX_ATTEMPTS = 8
"""After so many failures, which take about two days, a training is given up until `ask_again`."""
HOLD_SECONDS = 3600.0
"""For so long no other process records the same training; so late it is tried again if this process dies."""
LONGEST_WAIT_SECONDS = 24 * 3600.0
STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.CANCELLED: "KILLED"}


def is_behind(session: Session) -> bool:
    """Whether an ended training is to be recorded in MLflow now, a deleted one's run to be deleted, or its registry is
    behind."""
    missed = session.scalar(_due_jobs().limit(1)) is not None
    return missed or registry_sync.is_behind(session) or run_deletion.is_due(session)


def mark_tracked(session: Session, job_id: uuid.UUID, run_id: str | None) -> None:
    """Record that MLflow has the whole training, and in which run: a slow MLflow may have opened it late."""
    _set_run(session, job_id, run_id)
    session.execute(update(Job).where(Job.id == job_id).values(tracked_at=NOW))


def ask_again(session: Session) -> int:
    """Try again to record the trainings that were given up. Returns their number."""
    given_up = select(Job.id).where(*_untracked(), Job.tracking_attempts >= MAX_ATTEMPTS)
    free = given_up.with_for_update(skip_locked=True, key_share=True)  # it must not wait for several jobs
    found = session.execute(
        update(Job).where(Job.id.in_(free)).values(tracking_attempts=0, track_after=None).returning(Job.id)
    )
    return len(found.all())


def backfill_runs(resources: Resources) -> int:
    """Delete the runs of deleted trainings, record ended ones from their rows, then synchronize the registry. Returns
    the number of recorded trainings; 0 also if MLflow is still away."""
    client, done = runs.connect(resources.settings.mlflow_url), 0
    if not runs.answers(client):
        log.warning("mlflow_away")
        return 0
    with _log_and_continue():
        run_deletion.delete_runs(client, resources.sessions)
    with _log_and_continue():
        done = _record_due(client, resources)
    with _log_and_continue():
        registry_sync.sync_registry(client, resources.sessions)
    return done


@contextmanager
def _log_and_continue() -> Iterator[None]:
    """Log an error and continue: the next call tries again."""
    try:
        yield
    except Exception as error:
        log.warning("mlflow_backfill_failed", error=type(error).__name__)


# --- which trainings ---


def _untracked() -> list[ColumnElement[bool]]:
    ended = and_(Job.finished_at.is_not(None), Job.attempt > 0)
    return [Job.kind == JobKind.TRAIN.value, Job.tracked_at.is_(None), ended]


def _due_jobs() -> Select[Any]:
    """Trainings to record now; those that failed least come first, then the oldest."""
    due = or_(Job.track_after.is_(None), Job.track_after <= NOW)
    waiting = select(Job.id).where(*_untracked(), Job.tracking_attempts < MAX_ATTEMPTS, due)
    return waiting.order_by(Job.tracking_attempts, Job.id)


def _claim(session: Session) -> Any | None:
    """The next training with the number of this attempt; None if nothing is due."""
    first = _due_jobs().limit(1).with_for_update(skip_locked=True, key_share=True).scalar_subquery()
    attempt = {"tracking_attempts": Job.tracking_attempts + 1, "track_after": NOW + seconds(HOLD_SECONDS)}
    claimed = update(Job).where(Job.id == first).values(**attempt).returning(Job.id, Job.tracking_attempts)
    return session.execute(claimed.execution_options(synchronize_session=False)).first()


def _postpone(session: Session, job_id: uuid.UUID, attempts: int, wait: float) -> None:
    values = {"tracking_attempts": attempts, "track_after": NOW + seconds(wait)}
    session.execute(update(Job).where(Job.id == job_id).values(**values))


def _set_run(session: Session, job_id: uuid.UUID, run_id: str | None) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(mlflow_run_id=run_id))
    session.execute(update(ModelVersion).where(ModelVersion.job_id == job_id).values(mlflow_run_id=run_id))


def _record_due(client: Any, resources: Resources) -> int:
    """Record trainings one after the other, until none is due, or MLflow does not answer any more."""
    for done in range(BATCH_SIZE):
        with resources.sessions.begin() as session:
            claimed = _claim(session)
        if claimed is None or not _try(client, resources, claimed.id, claimed.tracking_attempts):
            return done
    return BATCH_SIZE


def _try(client: Any, resources: Resources, job_id: uuid.UUID, attempt: int) -> bool:
    """Record a training, or note its failure, which delays no other training. False: MLflow is away, which is no
    failure of the training."""
    try:
        _record(client, resources, job_id)
    except Exception as error:
        is_away = not runs.answers(client)
        wait = min(resources.settings.track_again_seconds * 4 ** (attempt - 1), LONGEST_WAIT_SECONDS)
        with resources.sessions.begin() as session:
            _postpone(session, job_id, attempt - is_away, 0 if is_away else wait)
        _log_failure(job_id, attempt - is_away, error)
        return not is_away
    return True


def _log_failure(job_id: uuid.UUID, failures: int, error: Exception) -> None:
    found = {"job_id": str(job_id), "failures": failures, "error": type(error).__name__}
    if failures >= MAX_ATTEMPTS:
        log.error("mlflow_backfill_given_up", **found)
    else:
        log.warning("mlflow_backfill_failed", **found)


# --- what is recorded ---


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
        return describe(spec, job.id, job.params, dataset.digest if dataset else None, name=job.name)
    known = model.dataset_digest, model.code_revision, model.environment
    return describe(spec, job.id, model.params, *known, name=job.name)


def _record(client: Any, resources: Resources, job_id: uuid.UUID) -> None:
    with resources.sessions.begin() as session:
        rows = _read(session, job_id)
    run = runs.open_run(client, rows.what, rows.run_id, lambda run_id: _save_run(resources, job_id, run_id))
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


def _save_run(resources: Resources, job_id: uuid.UUID, run_id: str) -> None:
    with resources.sessions.begin() as session:
        _set_run(session, job_id, run_id)


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
