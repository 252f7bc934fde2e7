"""The four stages in order. Each reads its inputs from disk and writes its outputs there, so each can run alone (dvc).

`run_all` runs them in one process and hands large results on in memory: the network before training (2 × 537 MB as
files) is not written, and features are not computed again for the evaluation. Everything else is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ml.image.networks.network import read_metadata
from ml.image.stages.base_model import prepare_base_model
from ml.image.stages.evaluation import artifacts, evaluation
from ml.image.stages.ingestion import data_ingestion
from ml.image.stages.run import Run, RunEnvironment
from ml.image.stages.training import training
from ml.runtime.config import PipelineConfig
from ml.runtime.events import Emit, Finished, StageFinished, StageStarted
from ml.spec.image import Params

Stage = Callable[[Run], None]
STAGES: dict[str, Stage] = {
    "data_ingestion": data_ingestion,
    "prepare_base_model": prepare_base_model,
    "training": training,
    "evaluation": evaluation,
}


def run_all(config: PipelineConfig, params: Params, emit: Emit, environment: RunEnvironment | None = None) -> Finished:
    """Run all four stages in this process. The last event emitted is `finished`, which is also returned."""
    run = Run(config, params, emit, environment or RunEnvironment(), in_one_process=True)
    for name in STAGES:
        run_stage(name, run)
    finished = Finished(
        str(config.training.trained_model_path),
        artifacts(run),
        round(run.device_seconds, 3),
        dataset_digest=run.report.digest,
        environment=_provenance(config.training.trained_model_path),
    )
    emit(finished)
    return finished


def _provenance(model: Path) -> dict[str, str]:
    """What two equal environments may still differ in: the device, and the weights that the network began with."""
    metadata = read_metadata(model)
    found = {name: metadata.get(name) for name in ("engine", "device", "precision")}
    found["base_weights_sha256"] = (metadata.get("weights") or {}).get("sha256")
    return {name: str(value) for name, value in found.items() if value}


def run_stage(name: str, run: Run) -> None:
    """Run one stage, between its `stage_started` and `stage_finished` events."""
    started = time.perf_counter()
    run.emit(StageStarted(name))
    with run.outlook.following(name):
        STAGES[name](run)
    run.emit(StageFinished(name, round(time.perf_counter() - started, 3)))
