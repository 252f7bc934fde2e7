"""The four stages. Each reads its inputs from disk and writes its outputs there, so each can run alone (and by dvc).

`run` does all four in one process and hands big things on in memory: the network before training (2 × 537 MB as files)
is then not written, and features are not computed again for the evaluation. Else all is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ml.image.stages.base_model import prepare_base_model
from ml.image.stages.evaluation import artifacts, evaluation
from ml.image.stages.ingestion import data_ingestion
from ml.image.stages.run import Run, Surroundings
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


def run(config: PipelineConfig, params: Params, emit: Emit, around: Surroundings | None = None) -> Finished:
    """All four stages in this process; ends with the `finished` event, which is also returned."""
    whole = Run(config, params, emit, around or Surroundings(), whole=True)
    for name in STAGES:
        run_stage(name, whole)
    finished = Finished(str(config.training.trained_model_path), artifacts(whole), round(whole.device_seconds, 3))
    emit(finished)
    return finished


def run_stage(name: str, state: Run) -> None:
    """One stage, between its `stage_started` and `stage_finished` events."""
    started = time.perf_counter()
    state.emit(StageStarted(name))
    STAGES[name](state)
    state.emit(StageFinished(name, round(time.perf_counter() - started, 3)))
