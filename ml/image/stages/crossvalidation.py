"""k-fold cross-validation (Stone 1974): k trainings more, of which each tests the scans that the others learned from.

The frozen backbone is the same for all of them, so without augmentation a fold costs its head's training alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ml.evaluation.metrics import Judged, score
from ml.image.dataset.splits import Split, fold_splits
from ml.image.learning.train import TrainConfig, logits_of, train
from ml.image.stages.base_model import prepared
from ml.image.stages.run import Run
from ml.image.stages.training import data_of
from ml.runtime.errors import naming_out_of_memory
from ml.runtime.process_group import ALONE

TOLD = ("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc", "loss")


def run(state: Run, tell: Callable[[float], None]) -> dict[str, Any]:
    """{folds: [figures], mean: {}, std: {}}; a figure that a fold does not have (one class in its test) is left out of
    the mean. `tell` hears the fraction done."""
    params = state.params
    splits = fold_splits(state.report, params.seed, params.folds, params.validation_size)
    figures = []
    for number, split in enumerate(splits):
        figures.append(_fold(state, split, lambda part, number=number: tell((number + part) / len(splits))))  # type: ignore[misc]
    return {
        "folds": figures,
        "mean": {name: _over(figures, name, np.mean) for name in TOLD},
        "std": {name: _over(figures, name, lambda values: np.std(values, ddof=1)) for name in TOLD},
    }


def _fold(state: Run, split: Split, tell: Callable[[float], None]) -> dict[str, Any]:
    model = prepared(state)
    data = data_of(state, model, split, ALONE)
    for _ in train(TrainConfig(model, state.params, tell), data):
        pass
    top = state.params.fine_tune_blocks if state.params.fine_tune_epochs else 0
    _, above = model.cut(top)

    def logits(scans: np.ndarray) -> np.ndarray:
        with naming_out_of_memory():
            return logits_of(above.eval().requires_grad_(False), data.features(top), scans).numpy()

    labels = data.labels
    judged = Judged(
        model.classes, labels[split.test], logits(split.test), labels[split.validation], logits(split.validation),
        seed=state.params.seed,
    )  # fmt: skip
    scores = score(judged).as_dict()
    return {name: scores[name] for name in TOLD} | {"test": len(split.test)}


def _over(figures: list[dict[str, Any]], name: str, summary: Callable[[list[float]], Any]) -> float | None:
    values = [one[name] for one in figures if one[name] is not None]
    return float(summary(values)) if len(values) > 1 else None
