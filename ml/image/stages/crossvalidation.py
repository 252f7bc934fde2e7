"""k-fold cross-validation (Stone 1974): k more trainings, each of which tests scans that the others learned from.

All folds share the frozen backbone, so without augmentation a fold only costs the training of its head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ml.evaluation.metrics import ModelOutputs, score
from ml.image.dataset.splits import Split, fold_splits
from ml.image.learning.train import TrainConfig, logits_of, train
from ml.image.stages.base_model import build_base_model
from ml.image.stages.run import Run
from ml.image.stages.training import train_data
from ml.runtime.errors import naming_out_of_memory
from ml.runtime.process_group import SINGLE_PROCESS

FIGURES = ("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc", "loss")


def cross_validate(run: Run, on_progress: Callable[[float], None]) -> dict[str, Any]:
    """{folds: [figures], mean: {}, std: {}}. Folds without a figure (an AUC with one class) do not count in its mean.

    `on_progress` is called with the fraction done, 0 to 1.
    """
    params = run.params
    splits = fold_splits(run.report, params.seed, params.folds, params.validation_size)
    folds = []
    for number, split in enumerate(splits):
        folds.append(_fold(run, split, lambda part, number=number: on_progress((number + part) / len(splits))))  # type: ignore[misc]
    return {
        "folds": folds,
        "mean": {name: _over(folds, name, np.mean) for name in FIGURES},
        "std": {name: _over(folds, name, lambda values: np.std(values, ddof=1)) for name in FIGURES},
    }


def _fold(run: Run, split: Split, on_progress: Callable[[float], None]) -> dict[str, Any]:
    model = build_base_model(run)
    data = train_data(run, model, split, SINGLE_PROCESS)
    for _ in train(TrainConfig(model, run.params, on_progress), data):
        pass
    top = run.params.fine_tune_blocks if run.params.fine_tune_epochs else 0
    _, above = model.cut(top)

    def logits(scans: np.ndarray) -> np.ndarray:
        with naming_out_of_memory():
            return logits_of(above.eval().requires_grad_(False), data.features(top), scans).numpy()

    labels = data.labels
    outputs = ModelOutputs(
        model.classes, labels[split.test], logits(split.test), labels[split.validation], logits(split.validation),
        seed=run.params.seed, positive=run.positive,
    )  # fmt: skip
    scores = score(outputs).as_dict()
    return {name: scores[name] for name in FIGURES} | {"test": len(split.test)}


def _over(folds: list[dict[str, Any]], name: str, summary: Callable[[list[float]], Any]) -> float | None:
    values = [fold[name] for fold in folds if fold[name] is not None]
    return float(summary(values)) if len(values) > 1 else None
