"""MLflow's registry follows ours: on a real server, and what the rows alone say."""

import json
import os
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.models import promotion
from jobs.models.cards import notify_registry_sync
from jobs.models.gate import GatePolicy
from jobs.settings import Settings
from jobs.states import Lane
from jobs.tables import Job, ModelVersion, RegistryMirror
from ml.spec.registry import spec_of
from tests import builders
from tests.processes import ROOT, eventually
from worker.dispatcher.loop import Dispatcher
from worker.execution.resources import Resources
from worker.tracking import backfill, experiment, runs
from worker.tracking.registry_sync import TenantRows, _write, is_behind, sync_registry

# --- what the rows say ---


def test_the_registry_is_behind_until_each_version_with_a_run_and_each_promotion_is_there(sessions: Sessions) -> None:
    with sessions.begin() as session:
        assert not is_behind(session)
        version = builders.make_model(session, mlflow_run_id="r1")
        assert is_behind(session), "a version is missing"
        version.mlflow_version = "1"
        session.flush()
        assert is_behind(session), "its promotion is missing"
        session.add(RegistryMirror(tenant_id=builders.TENANT, promotion_id=1))
        session.flush()
        assert not is_behind(session)
        builders.make_model(session, {"f1": 0.5}, mlflow_run_id="r2").mlflow_version = "2"
        assert not is_behind(session)
        promotion.promote(session, builders.TENANT, "2", GatePolicy(), force=True, reason="To see.")
        assert is_behind(session)


def test_a_version_without_a_run_waits_for_it(sessions: Sessions) -> None:
    with sessions.begin() as session:
        builders.make_model(session)
        assert not is_behind(session)


def test_a_tenant_locked_by_another_process_is_skipped(sessions: Sessions) -> None:
    with sessions.begin() as session:
        builders.make_model(session, mlflow_run_id="r1")
    with sessions.begin() as other:
        other.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"mlflow_registry:{builders.TENANT}"))))
        sync_registry("no client is asked", sessions)


def test_a_promotion_and_the_sync_do_not_deadlock(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for run in ("r1", "r2", "r3"):
            builders.make_model(session, {"f1": 0.97}, mlflow_run_id=run)
        versions = session.scalars(select(ModelVersion).order_by(ModelVersion.version)).all()
    versions[0].mlflow_version = "1"
    rows = TenantRows(builders.TENANT, versions, 3, {})
    numbers = {version.id: str(version.version) for version in versions}
    writing = threading.Thread(target=_write, args=[sessions, rows, numbers])
    with sessions.begin() as session:  # a rollback from the third to the second, and one to the first
        _lock(session, versions[2])
        writing.start()
        eventually(lambda: _waiting(sessions) == 1, 10)
        _lock(session, versions[1])
        _lock(session, versions[0])
    writing.join(10)
    with sessions.begin() as session:
        mirrored = session.scalars(select(ModelVersion.mlflow_version).order_by(ModelVersion.version)).all()
    assert mirrored == [None, "2", "3"], "what is as it was is not written"


def _lock(session: Session, version: ModelVersion) -> None:
    session.execute(update(ModelVersion).where(ModelVersion.id == version.id).values(promoted_at=func.now()))


def _waiting(sessions: Sessions) -> int:
    """Backends that wait for somebody's lock."""
    here = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    with sessions.begin() as session:
        return session.scalar(here) or 0


def test_a_training_whose_run_was_opened_late_is_synced_too(sessions: Sessions) -> None:
    with sessions.begin() as session:
        version = builders.make_model(session)
        assert not is_behind(session)
        backfill.mark_tracked(session, version.job_id, "r1")
        session.flush()
        assert is_behind(session)


def test_a_promotion_does_not_wait_for_the_next_interval(
    settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung: list[bool] = []
    monkeypatch.setattr("worker.dispatcher.maintenance.publish_tracking", lambda: rung.append(True))
    rare = settings.model_copy(update={"mlflow_url": "http://mlflow", "track_again_seconds": 3600})
    dispatcher = Dispatcher(rare, sessions, lambda *_: None)
    with sessions.begin() as session:
        builders.make_model(session, mlflow_run_id="r1")
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    try:
        eventually(lambda: len(rung) == 1, 10)
        with sessions.begin() as session:
            notify_registry_sync(session)
        eventually(lambda: len(rung) == 2, 10)
    finally:
        dispatcher.stop()
        thread.join(10)


def test_requests_do_not_pile_up_while_the_training_workers_are_busy(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as broker:
        broker.delete(Lane.TRAIN)
        ask = "from worker.app import publish_tracking as ask; ask(); ask(); ask()"
        environment = {**os.environ, "RENALQ_REDIS_URL": redis_url}
        subprocess.run([sys.executable, "-c", ask], env=environment, cwd=ROOT, check=True, timeout=60)
        assert broker.llen(Lane.TRAIN) == 1
        broker.delete(Lane.TRAIN)


# --- on a real server ---


@pytest.mark.slow
def test_versions_and_aliases_follow_each_change_of_the_champion(
    mlflow_url: str, sessions: Sessions, tmp_path: Path
) -> None:
    client, tenant = runs.connect(mlflow_url), _tenant()
    logged, _ = (_make(sessions, client, tenant, f1) for f1 in (0.97, 0.90))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    client.log_artifact(logged.mlflow_run_id, str(weights))
    sync_registry(client, sessions)
    first, second = (client.get_model_version(f"renalq-{tenant}", number) for number in ("1", "2"))
    run = client.get_run(first.run_id)
    assert first.source == f"{run.info.artifact_uri}/model.safetensors"
    assert second.source == "renalq://models/2/weights", "MLflow was not given the weights"
    assert second.run_id
    told = {"renalq.version": "1", "renalq.weights_sha256": "a" * 64, "renalq.dataset_digest": "d" * 64}
    assert told.items() <= first.tags.items()
    assert (first.tags["renalq.gate"], second.tags["renalq.gate"]) == ("promoted", "not promoted")
    assert "F1 0.9000, the champion's 0.9700 (version 1)" in second.description
    assert _aliases(client, tenant) == {"champion": "1", "challenger": "2"}

    with sessions.begin() as session:
        promotion.promote(session, tenant, "2", GatePolicy(), force=True, reason="To see.")
        assert is_behind(session)
    sync_registry(client, sessions)
    assert _aliases(client, tenant) == {"champion": "2"}
    with sessions.begin() as session:
        promotion.rollback(session, tenant)
    sync_registry(client, sessions)
    assert _aliases(client, tenant) == {"champion": "1", "challenger": "2"}
    with sessions.begin() as session:
        assert not is_behind(session)
        assert session.scalars(select(ModelVersion.mlflow_version).order_by(ModelVersion.version)).all() == ["1", "2"]


@pytest.mark.slow
def test_a_pass_that_died_before_its_rows_is_done_again_without_a_trace(mlflow_url: str, sessions: Sessions) -> None:
    client, tenant = runs.connect(mlflow_url), _tenant()
    _make(sessions, client, tenant)
    sync_registry(client, sessions)
    with sessions.begin() as session:
        session.execute(update(ModelVersion).values(mlflow_version=None))
        session.execute(delete(RegistryMirror))
    sync_registry(client, sessions)
    assert len(client.search_model_versions(f"name='renalq-{tenant}'")) == 1
    with sessions.begin() as session:
        assert not is_behind(session)


@pytest.mark.slow
def test_a_deleted_run_does_not_block_the_sync(mlflow_url: str, sessions: Sessions) -> None:
    client, tenant = runs.connect(mlflow_url), _tenant()
    with sessions.begin() as session:
        builders.make_model(session, tenant_id=tenant, mlflow_run_id=uuid.uuid4().hex)
    _make(sessions, client, tenant, 0.98)
    sync_registry(client, sessions)
    assert client.get_model_version(f"renalq-{tenant}", "1").source == "renalq://models/1/weights"
    assert _aliases(client, tenant) == {"champion": "2"}


@pytest.mark.slow
def test_a_version_that_mlflow_refuses_delays_no_other(
    mlflow_url: str, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, tenant = runs.connect(mlflow_url), _tenant()
    ill, _ = (_make(sessions, client, tenant, f1) for f1 in (0.97, 0.98))
    create = client.create_model_version

    def refuse(name: str, source: str, run_id: str, **more: Any) -> Any:
        return create(name, "" if run_id == ill.mlflow_run_id else source, run_id, **more)

    monkeypatch.setattr(client, "create_model_version", refuse)
    sync_registry(client, sessions)
    assert _aliases(client, tenant) == {"champion": "1"}
    with sessions.begin() as session:
        assert is_behind(session)
        synced = session.scalars(select(ModelVersion.mlflow_version).order_by(ModelVersion.version)).all()
    assert synced == [None, "1"]


@pytest.mark.slow
def test_a_training_that_mlflow_missed_is_recorded_and_then_registered(
    mlflow_url: str, sessions: Sessions, resources: Resources
) -> None:
    tenant = _tenant()
    with sessions.begin() as session:
        builders.make_model(session, tenant_id=tenant)
    resources.settings.work.mkdir()
    assert backfill.backfill_runs(_at(mlflow_url, resources)) == 1
    with sessions.begin() as session:
        assert not backfill.is_behind(session)
    assert _aliases(runs.connect(mlflow_url), tenant) == {"champion": "1"}


@pytest.mark.slow
def test_runs_are_named_by_job_and_version_and_the_champions_is_linked(mlflow_url: str, sessions: Sessions) -> None:
    client, tenant = runs.connect(mlflow_url), _tenant()
    first, second = (_make(sessions, client, tenant, f1, name) for f1, name in ((0.97, "Kidneys"), (0.90, None)))
    assert [client.get_run(each.mlflow_run_id).info.run_name for each in (first, second)] == ["Kidneys", "image"]
    sync_registry(client, sessions)
    assert [client.get_run(each.mlflow_run_id).info.run_name for each in (first, second)] == ["Kidneys v1", "image v2"]
    assert _champions(client, tenant, first, second) == (
        f"[version 1](#/runs/{first.mlflow_run_id})",
        ["champion", None],
    )
    with sessions.begin() as session:
        promotion.promote(session, tenant, "2", GatePolicy(), force=True, reason="To see.")
    sync_registry(client, sessions)
    assert _champions(client, tenant, first, second) == (
        f"[version 2](#/runs/{second.mlflow_run_id})",
        ["", "champion"],
    )


def _champions(client: Any, tenant: str, *versions: ModelVersion) -> tuple[str, list[str | None]]:
    """The link on the experiment's page, and the tags of the runs."""
    note = client.get_experiment_by_name(experiment.NAME).tags["mlflow.note.content"]
    (line,) = (line for line in note.splitlines() if f"Champion of {tenant}:" in line)
    tags = [client.get_run(each.mlflow_run_id).data.tags.get("renalq.champion") for each in versions]
    return line.partition(": ")[2], tags


@pytest.mark.slow
def test_the_experiment_opens_on_the_runs_with_the_figures_that_matter(mlflow_url: str) -> None:
    client = runs.connect(mlflow_url)
    made = client.get_experiment(experiment.open_experiment(client))
    assert made.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(made.tags["mlflow.sharedViewState.renalq"])
    assert view["selectedColumns"][:2] == ["metrics.`test_f1`", "metrics.`test_recall`"]
    assert f"#/experiments/{made.experiment_id}/runs?viewStateShareKey=renalq" in made.tags["mlflow.note.content"]
    client.delete_experiment_tag(made.experiment_id, "mlflow.experimentKind")  # one of an older release has none
    experiment.open_experiment(client)
    assert client.get_experiment(made.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_mlflow_that_is_away_is_tried_again_later(
    sessions: Sessions, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # else it waits between them
    with sessions.begin() as session:
        builders.make_model(session, mlflow_run_id="r1")
    assert backfill.backfill_runs(_at(f"http://127.0.0.1:{free_port()}", resources)) == 0
    with sessions.begin() as session:
        assert is_behind(session)


def _tenant() -> str:
    """A tenant of the test's own: the server is one for all."""
    return f"t{uuid.uuid4().hex[:12]}"


def _at(mlflow_url: str, resources: Resources) -> Resources:
    return replace(resources, settings=resources.settings.model_copy(update={"mlflow_url": mlflow_url}))


def _make(sessions: Sessions, client: Any, tenant: str, f1: float = 0.97, name: str | None = None) -> ModelVersion:
    """A version with a run."""
    with sessions.begin() as session:
        version = builders.make_model(session, {"f1": f1}, tenant_id=tenant)
        session.get_one(Job, version.job_id).name = name
        what = runs.describe(spec_of("image"), version.job_id, version.params, version.dataset_digest, name=name)
        version.mlflow_run_id = runs.open_run(client, what, None)
    return version


def _aliases(client: Any, tenant: str) -> dict[str, str]:
    return {name: str(number) for name, number in client.get_registered_model(f"renalq-{tenant}").aliases.items()}
