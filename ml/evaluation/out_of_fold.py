"""Out-of-fold logits, of each scan by the one network of a cross-validation that did not see it; doubtful labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml.evaluation.calibration import Calibration, softmax
from ml.evaluation.metrics import ModelOutputs, score

FIGURES = ("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc", "loss")
POOLED = (*FIGURES, "specificity", "intervals", "interval_methods", "confusion_matrix", "held_out", "independent")
DOUBTFUL = 50
"""Labels that `doubtful_labels` lists at most."""


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """`logits` float32 [n, classes] of `scans`, sorted indices int64 [n], each by the network of its `fold`, int64 [n];
    and each fold's own `figures`."""

    scans: np.ndarray
    logits: np.ndarray
    fold: np.ndarray
    figures: Sequence[Mapping[str, Any]]

    @classmethod
    def of_folds(cls, scans: Sequence[np.ndarray], logits: Sequence[np.ndarray], figures: Sequence[Any]) -> OutOfFold:
        """From what each fold tested."""
        together = np.concatenate(scans)
        order = np.argsort(together)
        fold = np.repeat(np.arange(len(scans)), [len(each) for each in scans])
        return cls(together[order], np.concatenate(logits)[order], fold[order], figures)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("scans", "logits", "fold")}
        return {**arrays, "figures": [dict(one) for one in self.figures]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OutOfFold:
        """The inverse of `as_dict`; KeyError or ValueError for anything else."""
        scans, fold = (np.array(fields[name], np.int64) for name in ("scans", "fold"))
        return cls(scans, np.array(fields["logits"], np.float32), fold, fields["figures"])


def summary(
    found: OutOfFold,
    labels: np.ndarray,
    groups: np.ndarray,
    classes: tuple[str, ...],
    calibration: Calibration,
    seed: int,
    positive: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """{folds: [figures], mean, std, pooled}, for scores.json. `labels` and `groups`: int [n], of the same scans.
    `positive`: see `ModelOutputs`.

    Folds without a figure (an AUC with one class) do not count in its mean. `pooled`: figures of all scans that the
    folds tested, with intervals by group (patient), decided as the model decides: with the `calibration` that was
    chosen on these scans, two numbers for all of them.
    """
    outputs = ModelOutputs(
        classes, labels, found.logits, groups=groups, seed=seed, positive=positive, calibration=calibration
    )
    pooled = score(outputs).as_dict()
    return {
        "folds": [dict(one) for one in found.figures],
        "mean": {name: _over(found.figures, name, np.mean) for name in FIGURES},
        "std": {name: _over(found.figures, name, lambda values: np.std(values, ddof=1)) for name in FIGURES},
        "pooled": {name: pooled[name] for name in POOLED},
    }


def _over(folds: Sequence[Mapping[str, Any]], name: str, summary: Callable[[list[float]], Any]) -> float | None:
    values = [fold[name] for fold in folds if fold[name] is not None]
    return float(summary(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class DoubtfulLabel:
    """A scan that the network that did not see it takes for another class than its label says.

    `scan`: its index in the manifest. `probability`: of the label. `loss`: cross-entropy in nats.
    """

    scan: int
    label: str
    predicted: str
    probability: float
    loss: float


def doubtful_labels(
    found: OutOfFold, labels: np.ndarray, classes: tuple[str, ...], temperature: float
) -> list[DoubtfulLabel]:
    """The worst out-of-fold losses among scans that are taken for another class, worst first; at most `DOUBTFUL`.

    Their labels are wrong, or they are hard (Northcutt et al. 2021, "Confident learning"). `labels`: int [n], of the
    same scans. `temperature`: divides the logits.
    """
    probabilities, row = softmax(found.logits, temperature), np.arange(len(labels))
    predicted, of_label = probabilities.argmax(axis=1), probabilities[row, labels]
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(of_label[wrong], kind="stable")][:DOUBTFUL]
    return [
        DoubtfulLabel(
            int(found.scans[one]), classes[labels[one]], classes[predicted[one]],
            round(float(of_label[one]), 6), round(-float(np.log(max(of_label[one], 1e-300))), 4),
        )
        for one in worst
    ]  # fmt: skip
