"""Backfill of MLflow: each training for itself, on a real server from which runs are deleted."""

import socket
import time
import uuid
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.tables import Job, ModelVersion
from tests import builders
from worker.execution.resources import Resources
from worker.tracking import backfill, experiment, runs

pytestmark = pytest.mark.slow

REFUSED = {"..": 1}
"""Parameters that MLflow does not take: the name is no path of a file."""


@pytest.fixture
def tracked(resources: Resources, mlflow_url: str) -> Resources:
    """A worker's, with MLflow, that tries again without waiting."""
    resources.settings.work.mkdir()
    return at(mlflow_url, resources)


def at(mlflow_url: str, resources: Resources) -> Resources:
    more = {"mlflow_url": mlflow_url, "track_again_seconds": 1e-9}
    return replace(resources, settings=resources.settings.model_copy(update=more))


def make_training(sessions: Sessions, **new: Any) -> uuid.UUID:
    """A succeeded training that MLflow does not have, of a tenant of its own."""
    with sessions.begin() as session:
        return builders.make_model(session, tenant_id=f"t{uuid.uuid4().hex[:12]}", **new).job_id


def row(sessions: Sessions, job_id: uuid.UUID) -> Job:
    with sessions() as session:
        return session.get_one(Job, job_id)


def set_run(sessions: Sessions, job_id: uuid.UUID, run_id: str) -> None:
    with sessions.begin() as session:
        backfill._set_run(session, job_id, run_id)


@pytest.mark.parametrize("unknown", [False, True])
def test_a_deleted_run_is_made_anew_and_the_rows_follow(unknown: bool, sessions: Sessions, tracked: Resources) -> None:
    client, job_id = runs.connect(tracked.settings.mlflow_url), make_training(sessions)
    deleted = uuid.uuid4().hex
    if not unknown:
        place = client.get_experiment_by_name(experiment.NAME) or client.get_experiment("0")
        deleted = client.create_run(place.experiment_id).info.run_id
        client.delete_run(deleted)
    set_run(sessions, job_id, deleted)
    assert backfill.backfill_runs(tracked) == 1
    made = row(sessions, job_id)
    assert made.tracked_at is not None
    assert made.mlflow_run_id != deleted
    run = client.get_run(made.mlflow_run_id)
    assert (run.info.lifecycle_stage, run.info.status) == ("active", "FINISHED")
    assert run.data.tags["renalq.job_id"] == str(job_id)
    with sessions() as session:
        assert session.scalars(select(ModelVersion.mlflow_run_id)).all() == [made.mlflow_run_id]


def test_a_training_that_fails_delays_no_other_and_continues_its_run(sessions: Sessions, tracked: Resources) -> None:
    ill, well = make_training(sessions, params=REFUSED), make_training(sessions)
    assert backfill.backfill_runs(tracked) >= 1
    assert row(sessions, well).tracked_at is not None
    tried = row(sessions, ill)
    assert (tried.tracked_at, tried.mlflow_run_id is not None) == (None, True)
    assert tried.tracking_attempts >= 1
    with sessions.begin() as session:
        session.execute(update(ModelVersion).where(ModelVersion.job_id == ill).values(params={}))
        session.execute(update(Job).where(Job.id == ill).values(tracking_attempts=1))
    assert backfill.backfill_runs(tracked) == 1
    assert row(sessions, ill).mlflow_run_id == tried.mlflow_run_id


def test_a_training_is_given_up_after_some_attempts_until_somebody_asks(sessions: Sessions, tracked: Resources) -> None:
    ill = make_training(sessions, params=REFUSED)
    with capture_logs() as logged:
        for _ in range(backfill.MAX_ATTEMPTS + 1):
            backfill.backfill_runs(tracked)
    given_up = [line for line in logged if line["event"] == "mlflow_backfill_given_up"]
    assert [(line["job_id"], line["log_level"]) for line in given_up] == [(str(ill), "error")]
    assert row(sessions, ill).tracking_attempts == backfill.MAX_ATTEMPTS
    with sessions.begin() as session:
        assert session.scalar(backfill._due_jobs()) is None
        assert backfill.ask_again(session) == 1
        assert session.scalar(backfill._due_jobs()) == ill


def test_waits_grow_and_the_training_that_failed_least_is_next(sessions: Sessions, resources: Resources) -> None:
    one, other = make_training(sessions), make_training(sessions)
    with sessions.begin() as session:
        assert backfill._claim(session).id == one
        assert backfill._claim(session).id == other
        assert backfill._claim(session) is None, "they are held"
        backfill._postpone(session, one, 2, 0)
        backfill._postpone(session, other, 1, 0)
        assert session.scalars(backfill._due_jobs()).all() == [other, one]


def test_an_mlflow_that_takes_connections_and_answers_none_is_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert not runs.answers(runs.connect(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert time.monotonic() - began < 10, "MLflow's client alone tries three times, each for 20 s"


@pytest.mark.full
def test_an_mlflow_that_is_away_is_no_failure_of_a_training(sessions: Sessions, resources: Resources) -> None:
    job_id = make_training(sessions)
    away = at(f"http://127.0.0.1:{free_port()}", resources)
    assert backfill.backfill_runs(away) == 0
    assert not backfill._try(runs.connect(away.settings.mlflow_url), away, job_id, 1), "it went away meanwhile"
    assert row(sessions, job_id).tracking_attempts == 0
    with sessions() as session:
        assert session.scalar(backfill._due_jobs()) == job_id
