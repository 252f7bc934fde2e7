"""MLflow runs on a real tracking server; and what happens without one."""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from cli.plans import free_port
from jobs.settings import Settings
from ml.events import Epoch
from tests.processes import eventually
from worker.tracking import EXPERIMENT, Run, describe

WHAT = describe(uuid.uuid4(), {"epochs": 2, "weights": "none"}, None)
EPOCH = Epoch(1, 2, 0.7, 0.5, 0.6, 0.75, 0.01, 3.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an MLflow server that keeps all it has in a folder."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command, *store], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _healthy(url), 60, lambda: (folder / "log").read_text())
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_a_run_carries_params_epochs_artifacts_and_weights(server: str, tmp_path: Path) -> None:
    scores, weights = tmp_path / "scores.json", tmp_path / "model.safetensors"
    scores.write_text("{}")
    weights.write_bytes(b"w" * 1000)
    told: list[str] = []
    run = Run(Settings(mlflow_url=server), WHAT, told.append)
    run.epoch(EPOCH)
    run.final({"f1": 0.95, "classes": ["Normal", "Tumor"]})
    run.artifacts([scores], weights)
    run.end("FINISHED", patience=60)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    seen = client.get_run(told[0])
    assert client.get_experiment(seen.info.experiment_id).name == EXPERIMENT
    assert (seen.info.status, seen.info.run_name) == ("FINISHED", str(WHAT.job_id))
    assert seen.data.params == {"epochs": "2", "weights": "none"}
    assert seen.data.tags["renalq.job_id"] == str(WHAT.job_id)
    assert run.is_complete
    assert seen.data.metrics["val_accuracy"] == 0.75
    assert seen.data.metrics["test_f1"] == 0.95
    assert {file.path for file in client.list_artifacts(told[0])} == {"scores.json", "model.safetensors"}


def test_without_an_address_nothing_is_tracked_and_nothing_waits() -> None:
    run = Run(Settings(mlflow_url=""), WHAT, lambda _: pytest.fail("no run was to begin"))
    run.epoch(EPOCH)
    started = time.monotonic()
    run.end("FINISHED")
    assert time.monotonic() - started < 1


@pytest.mark.slow
def test_a_server_that_is_away_costs_the_job_nothing(tmp_path: Path) -> None:
    run = Run(Settings(mlflow_url=f"http://127.0.0.1:{free_port()}"), WHAT, lambda _: None)
    run.epoch(EPOCH)
    run.artifacts([tmp_path / "scores.json"], tmp_path / "weights")
    started = time.monotonic()
    run.end("FAILED")
    assert time.monotonic() - started < 1, "a job's end waits for nobody"
    run.end("FAILED", patience=60)
    assert run.run_id is None
    assert not run.is_complete


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_the_same_run(server: str) -> None:
    told: list[str] = []
    for run_id, epochs in ((None, [EPOCH]), ("told", [replace(EPOCH, epoch=2)])):
        run = Run(Settings(mlflow_url=server), WHAT, told.append, run_id and told[0])
        for epoch in epochs:
            run.epoch(epoch)
        run.end("FINISHED" if run_id else "KILLED", patience=60)

    from mlflow import MlflowClient

    assert told[0] == told[1]
    assert [point.step for point in MlflowClient(tracking_uri=server).get_metric_history(told[0], "val_loss")] == [1, 2]


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.RequestException:
        return False
