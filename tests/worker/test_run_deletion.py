"""Runs of deleted trainings leave MLflow: on a real server."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowException
from sqlalchemy import select, text

from jobs.db import Sessions
from jobs.deletions.of_jobs import delete_job
from jobs.retention import deletions
from jobs.states import JobState
from jobs.tables import Deletion, Job, ReleasedRun
from tests import builders
from worker.execution.resources import Resources
from worker.tracking import backfill, run_deletion, runs
from worker.tracking.experiment import open_experiment

pytestmark = pytest.mark.slow


@pytest.fixture
def tracked(resources: Resources, mlflow_url: str) -> Resources:
    """A worker's, with MLflow."""
    return replace(resources, settings=resources.settings.model_copy(update={"mlflow_url": mlflow_url}))


def make_run(client: Any, job_id: uuid.UUID, folder: Path) -> str:
    """A run with a file and a version in the registry, as a training leaves it."""
    run = client.create_run(open_experiment(client), tags={run_deletion.JOB_TAG: str(job_id)}).info
    (folder / "report.html").write_text("pictures of kidneys")
    client.log_artifact(run.run_id, str(folder / "report.html"), "plots")
    name = f"renalq-{uuid.uuid4().hex[:8]}"
    client.create_registered_model(name)
    client.create_model_version(name, run.artifact_uri, run.run_id, tags={run_deletion.JOB_TAG: str(job_id)})
    return str(run.run_id)


def deleted_training(sessions: Sessions, resources: Resources, client: Any, folder: Path) -> tuple[str, uuid.UUID]:
    """A training whose rows are gone; its run, and its receipt."""
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.FAILED)
        run = make_run(client, job.id, folder)
        session.get_one(Job, job.id).mlflow_run_id = run
    with sessions.begin() as session:
        receipt = delete_job(session, builders.TENANT, job.id).id
    while deletions.step(sessions, resources.artifacts, resources.settings):
        pass
    with sessions.begin() as session:
        session.execute(text("UPDATE released_runs SET due_at = now()"))
        session.execute(text("UPDATE deletions SET due_at = now()"))
    return run, receipt


def test_a_run_goes_with_its_files_and_its_version(tracked: Resources, sessions: Sessions, tmp_path: Path) -> None:
    client = runs.connect(tracked.settings.mlflow_url)
    run, receipt = deleted_training(sessions, tracked, client, tmp_path)
    other = make_run(client, uuid.uuid4(), tmp_path)
    assert not deletions.step(sessions, tracked.artifacts, tracked.settings) or not _finished(sessions, receipt)
    with sessions.begin() as session:
        assert backfill.is_behind(session)
    backfill.backfill_runs(tracked)
    assert client.get_run(run).info.lifecycle_stage == "deleted"
    assert client.list_artifacts(run) == []
    assert client.search_model_versions(f"run_id='{run}'") == []
    assert client.get_run(other).info.lifecycle_stage == "active"
    assert [file.path for file in client.list_artifacts(other)] == ["plots"]
    assert len(client.search_model_versions(f"run_id='{other}'")) == 1
    with sessions.begin() as session:
        assert session.scalars(select(ReleasedRun)).all() == []
        assert not backfill.is_behind(session)
        assert session.get_one(Deletion, receipt).counts["mlflow_runs"] == 1
        session.execute(text("UPDATE deletions SET due_at = now()"))
    deletions.step(sessions, tracked.artifacts, tracked.settings)
    assert _finished(sessions, receipt)


def _finished(sessions: Sessions, receipt: uuid.UUID) -> bool:
    with sessions() as session:
        return session.get_one(Deletion, receipt).finished_at is not None


def test_a_run_that_is_gone_already_does_no_harm(tracked: Resources, sessions: Sessions, tmp_path: Path) -> None:
    client = runs.connect(tracked.settings.mlflow_url)
    run, _ = deleted_training(sessions, tracked, client, tmp_path)
    client.delete_run(run)
    assert run_deletion.delete_runs(client, sessions) == 1
    run_deletion.delete_run(client, uuid.uuid4(), uuid.uuid4().hex)


def test_files_that_mlflows_server_does_not_keep_are_left_alone(tracked: Resources, tmp_path: Path) -> None:
    """Whoever may make experiments in MLflow could name any folder."""
    client, job_id = runs.connect(tracked.settings.mlflow_url), uuid.uuid4()
    (tmp_path / "admin.key").write_text("secret")
    try:
        experiment = client.create_experiment(uuid.uuid4().hex, artifact_location=tmp_path.as_uri())
    except MlflowException:
        pytest.skip("this server refuses other folders itself")
    run = client.create_run(experiment, tags={run_deletion.JOB_TAG: str(job_id)}).info.run_id
    run_deletion.delete_run(client, job_id, run)
    assert client.get_run(run).info.lifecycle_stage == "deleted"
    assert (tmp_path / "admin.key").exists()
