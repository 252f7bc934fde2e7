"""MLflow runs on a real tracking server; and what happens without one."""

import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.stack.server_plan import free_port
from jobs.settings import Settings
from ml.runtime.events import Epoch, Steps
from ml.spec.registry import spec_of
from tests.processes import eventually
from worker.tracking import experiment
from worker.tracking.live import Run
from worker.tracking.runs import describe

DIGEST = "ab" * 32
WHAT = describe(spec_of("image"), uuid.uuid4(), {"epochs": 2, "weights": "none", "image_size": [64, 64, 3]}, DIGEST)
EPOCH = Epoch(1, 2, 0.7, 0.5, 0.6, 0.75, 0.01, 3.5, val_f1=0.8)
SHOWN = ("mistakes.png", "report.html", "report.pdf", "manifest.json")


@pytest.mark.slow
def test_a_run_has_all_events_of_a_training(mlflow_url: str, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"w" * 1000)
    files = {name: tmp_path / name for name in ("scores.json", "roc.png", *SHOWN)}
    for path in files.values():
        path.write_text("{}")
    told: list[str] = []
    run = Run(Settings(mlflow_url=mlflow_url), WHAT, told.append)
    run.log_epoch(EPOCH)
    run.log_epoch(replace(EPOCH, epoch=2, phase="fine_tune"))
    run.log_scores({"f1": 0.95, "classes": ["Normal", "Tumor"], "per_class": {"Tumor": {"f1": 0.9}}})
    run.log_artifacts(files, weights)
    run.log_weights(DIGEST, "c" * 64, "e" * 64)
    run.end("FINISHED", wait_seconds=60)

    client = _client(mlflow_url)
    seen = client.get_run(told[0])
    assert run.is_complete
    assert client.get_experiment(seen.info.experiment_id).name == experiment.NAME
    assert (seen.info.status, seen.info.run_name) == ("FINISHED", "image")
    assert seen.data.params == {"epochs": "2", "weights": "none", "image_size": "[64, 64, 3]"}
    assert seen.data.tags["renalq.job_id"] == str(WHAT.job_id)
    assert seen.data.tags["renalq.dataset_digest"] == DIGEST
    assert seen.data.tags["renalq.weights_sha256"] == "c" * 64
    assert seen.data.tags["renalq.base_weights_sha256"] == "e" * 64
    assert {"environment.torch", "environment.numpy", "environment.python"} <= set(seen.data.tags)
    (used,) = seen.inputs.dataset_inputs
    assert DIGEST.startswith(used.dataset.digest)
    assert seen.data.metrics["val_accuracy"] == 0.75
    assert seen.data.metrics["val_f1"] == 0.8
    assert [point.value for point in client.get_metric_history(told[0], "phase")] == [0, 1]
    assert seen.data.metrics["test_f1"] == 0.95
    assert seen.data.metrics["test_per_class.Tumor.f1"] == 0.9
    assert {file.path for file in client.list_artifacts(told[0])} == {"scores.json", "roc.png", "model.safetensors"}


def test_nothing_that_shows_a_scan_or_a_name_is_public() -> None:
    assert not set(SHOWN) & set(spec_of("image").public_artifacts)


@pytest.mark.slow
def test_every_step_is_a_point_and_no_step_is_a_call_of_its_own(
    mlflow_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    calls: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **more: Any) -> Any:
        calls.append(len(metrics))
        return real(self, run_id, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    told: list[str] = []
    run = Run(Settings(mlflow_url=mlflow_url), WHAT, told.append)
    for first in range(1, 2401, 30):
        run.log_steps(Steps(1, first, [1 / (first + number) for number in range(30)], 0.01))
    run.end("FINISHED", wait_seconds=60)

    losses = _client(mlflow_url).get_metric_history(told[0], "train_loss_step")
    assert sorted(point.step for point in losses) == list(range(1, 2401))
    assert {point.step: point.value for point in losses}[2400] == pytest.approx(1 / 2400)
    rates = _client(mlflow_url).get_metric_history(told[0], "learning_rate_step")
    assert [point.step for point in rates][-1] == 2400
    assert len(calls) < 10
    assert max(calls) <= 1000


@pytest.mark.slow
def test_system_metrics_cover_the_whole_run(mlflow_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.tracking.live.SAMPLE_SECONDS", 0.3)
    told: list[str] = []
    run = Run(Settings(mlflow_url=mlflow_url), WHAT, told.append)
    eventually(lambda: told, 30)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        run.measure(busy.pid)
        time.sleep(2)
        run.end("FINISHED", wait_seconds=60)
    finally:
        busy.kill()
        busy.wait()

    client = _client(mlflow_url)
    assert len(client.get_metric_history(told[0], "system/cpu_utilization_percentage")) >= 4
    assert client.get_run(told[0]).data.metrics["system/training_memory_usage_megabytes"] > 1
    used = client.get_metric_history(told[0], "system/training_cpu_utilization_percentage")
    assert max(point.value for point in used) > 20


def test_without_a_url_nothing_is_tracked_and_nothing_waits() -> None:
    run = Run(Settings(mlflow_url=""), WHAT, lambda _: pytest.fail("no run was to begin"))
    run.log_epoch(EPOCH)
    started = time.monotonic()
    run.end("FINISHED")
    assert time.monotonic() - started < 1


@pytest.mark.slow
def test_an_unreachable_server_does_not_delay_the_job(tmp_path: Path) -> None:
    run = Run(Settings(mlflow_url=f"http://127.0.0.1:{free_port()}"), WHAT, lambda _: None)
    run.log_epoch(EPOCH)
    run.log_artifacts({"scores.json": tmp_path / "scores.json"}, tmp_path / "weights")
    started = time.monotonic()
    run.end("FAILED")
    assert time.monotonic() - started < 1, "a job's end waits for nobody"
    run.end("FAILED", wait_seconds=60)
    assert run.run_id is None
    assert not run.is_complete
    run.log_steps(Steps(1, 1, [0.5] * 1000, 0.01))
    assert run._steps.qsize() < 10, "what nobody will take is not kept"


@pytest.mark.slow
def test_a_resumed_training_continues_the_same_run(mlflow_url: str) -> None:
    told: list[str] = []
    for run_id, epochs in ((None, [EPOCH]), ("told", [replace(EPOCH, epoch=2)])):
        run = Run(Settings(mlflow_url=mlflow_url), WHAT, told.append, run_id and told[0])
        for epoch in epochs:
            run.log_epoch(epoch)
        run.end("FINISHED" if run_id else "KILLED", wait_seconds=60)

    assert told[0] == told[1]
    assert [point.step for point in _client(mlflow_url).get_metric_history(told[0], "val_loss")] == [1, 2]


def _client(url: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url)
