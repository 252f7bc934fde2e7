"""Scores on held-out scans, by scikit-learn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_POSITIVE = ("tumor", "tumour")


@dataclass(frozen=True)
class Scores:
    """Scores 0–1; `loss` is the mean cross-entropy in nats. `confusion_matrix[true][predicted]` counts scans.

    With two classes precision, recall and f1 are those of `positive`; with more they are macro means, `positive` None.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    loss: float
    per_class: dict[str, dict[str, float]]
    confusion_matrix: list[list[int]]
    classes: list[str]
    positive: str | None
    held_out: int

    def as_dict(self) -> dict[str, Any]:
        """For scores.json and the `evaluated` event."""
        return asdict(self)


def positive_class(classes: tuple[str, ...]) -> str | None:
    """The class of a positive finding: Tumor where there is one, else the last of two; None for more than two."""
    if len(classes) != 2:
        return None
    return next((name for name in classes if name.lower() in _POSITIVE), classes[-1])


def score(labels: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> Scores:
    """Scores of logits [N, classes] against int labels [N]."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted, indices = logits.argmax(axis=1), np.arange(len(classes))
    each = precision_recall_fscore_support(labels, predicted, labels=indices, zero_division=0)
    positive = positive_class(classes)
    chosen = [classes.index(positive)] if positive else list(indices)
    precision, recall, f1 = (float(np.mean(values[chosen])) for values in each[:3])
    return Scores(
        accuracy=float((predicted == labels).mean()),
        precision=precision,
        recall=recall,
        f1=f1,
        loss=_cross_entropy(labels, logits),
        per_class={name: _of_class(each, index) for index, name in enumerate(classes)},
        confusion_matrix=confusion_matrix(labels, predicted, labels=indices).tolist(),
        classes=list(classes),
        positive=positive,
        held_out=len(labels),
    )


def _of_class(each: tuple[np.ndarray, ...], index: int) -> dict[str, float]:
    names = ("precision", "recall", "f1", "support")
    return {name: float(values[index]) for name, values in zip(names, each, strict=True)}


def _cross_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())
