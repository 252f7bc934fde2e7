"""Deletion of runs in MLflow whose trainings were deleted: their files, their versions in its registry, the run itself.

MLflow marks a run as deleted, and keeps its parameters, tags and metrics until `mlflow gc`; its files and its name go
at once.
"""

import uuid
from collections.abc import Iterator
from typing import Any

import structlog
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions, seconds
from jobs.deletions import receipts
from jobs.tables import Deletion, ReleasedRun
from worker.tracking import runs

log = structlog.get_logger()

RUNS = 50
"""Runs that are deleted at once, one after another."""
HOLD_SECONDS = 300.0
"""For so long no other process deletes the same run; so late it is tried again."""
JOB_TAG = "renalq.job_id"


def is_due(session: Session) -> bool:
    """Whether a run is to be deleted now."""
    return session.scalar(_due().limit(1)) is not None


def delete_runs(client: Any, sessions: Sessions) -> int:
    """Delete the runs that are due. One that MLflow refuses to delete is tried again later. Returns their number."""
    for done in range(RUNS):
        with sessions.begin() as session:
            claimed = _claim(session)
        if claimed is None:
            return done
        try:
            delete_run(client, claimed.job_id, claimed.run_id)
        except Exception as error:
            log.warning("mlflow_run_not_deleted", job_id=str(claimed.job_id), error=type(error).__name__)
            continue
        with sessions.begin() as session:
            _record(session, claimed.job_id)
    return RUNS


def _due():  # type: ignore[no-untyped-def]
    return select(ReleasedRun.job_id).where(ReleasedRun.due_at <= func.now()).order_by(ReleasedRun.due_at)


def _claim(session: Session) -> Any | None:
    first = _due().limit(1).with_for_update(skip_locked=True).scalar_subquery()
    held = {"attempts": ReleasedRun.attempts + 1, "due_at": NOW + seconds(HOLD_SECONDS)}
    claimed = update(ReleasedRun).where(ReleasedRun.job_id == first).values(**held)
    return session.execute(claimed.returning(ReleasedRun.job_id, ReleasedRun.run_id)).first()


def _record(session: Session, job_id: uuid.UUID) -> None:
    gone = delete(ReleasedRun).where(ReleasedRun.job_id == job_id).returning(ReleasedRun.deletion_id)
    deletion_id = session.scalar(gone)
    if deletion_id is not None:
        deletion = session.get_one(Deletion, deletion_id, with_for_update=True)
        receipts.add_counts(deletion, {"mlflow_runs": 1})


# --- MLflow ---


def delete_run(client: Any, job_id: uuid.UUID, run_id: str) -> None:
    """Delete this run of the job, and any other that its attempts may have left.

    Raises:
        MlflowException: MLflow refuses, or does not answer.
    """
    for version in client.search_model_versions(f"tags.`{JOB_TAG}` = '{job_id}'"):
        client.delete_model_version(version.name, version.version)
    for found in {run.info.run_id: run for run in _runs(client, job_id, run_id)}.values():
        _delete_files(client, found.info.artifact_uri)
        if found.info.lifecycle_stage == "active":
            client.update_run(found.info.run_id, name=str(job_id))  # a client gave it its name
            client.delete_run(found.info.run_id)


def _runs(client: Any, job_id: uuid.UUID, run_id: str) -> Iterator[Any]:
    from mlflow import MlflowException
    from mlflow.entities import ViewType

    experiments = [each.experiment_id for each in client.search_experiments(view_type=ViewType.ALL)]
    yield from client.search_runs(experiments, f"tags.`{JOB_TAG}` = '{job_id}'", ViewType.ALL)
    try:
        yield client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != runs.MISSING:
            raise


def _delete_files(client: Any, uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # Whoever may write to MLflow can give a run any address: only what its server keeps for us is deleted.
    if not uri.startswith("mlflow-artifacts:"):
        return
    store = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
    for file in store.list_artifacts():
        store.delete_artifacts(file.path)
