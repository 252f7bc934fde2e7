"""Learning curves and confusion matrix as PNG files. matplotlib is imported on first use: it takes half a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml.events import Epoch
from ml.metrics import Scores


def learning_curves(epochs: Sequence[Epoch], path: Path) -> None:
    """Loss and accuracy by epoch, on training and held-out scans."""
    figure = _figure(9, 3.6)
    numbers = [epoch.epoch for epoch in epochs]
    for place, (name, title) in enumerate((("loss", "Cross-entropy"), ("accuracy", "Accuracy"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for part, label in (("train", "training (with dropout)"), ("val", "held out")):
            axes.plot(numbers, [getattr(epoch, f"{part}_{name}") for epoch in epochs], marker="o", label=label)
        axes.set(title=title, xlabel="Epoch", xticks=numbers if len(numbers) <= 20 else numbers[:: len(numbers) // 10])
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def confusion_matrix(scores: Scores, path: Path) -> None:
    """Counts of true against predicted class."""
    figure = _figure(4.4, 4)
    axes = figure.add_subplot()
    axes.imshow(scores.confusion_matrix, cmap="Blues")
    ticks = range(len(scores.classes))
    axes.set(xlabel="Predicted", ylabel="True", title=f"{scores.held_out} held-out scans")
    axes.set_xticks(ticks, scores.classes)
    axes.set_yticks(ticks, scores.classes)
    most = max(max(row) for row in scores.confusion_matrix) or 1
    for true, row in enumerate(scores.confusion_matrix):
        for predicted, count in enumerate(row):
            colour = "white" if count > most / 2 else "black"
            axes.text(predicted, true, str(count), ha="center", va="center", color=colour)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # Figure without pyplot: no global state, no display, the Agg canvas.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
