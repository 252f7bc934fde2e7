"""Plots of a training and its scores, as PNG files and for the pages of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ml.evaluation.metrics import Mistake, ModelOutputs, Scores, worst_mistakes
from ml.reporting.curves import precision_recall, reliability_diagram, roc
from ml.reporting.drawing import BLUE, GREEN, GREY, ORANGE, RED, STYLES, Canvas, Plot, folded, legend_below, shown
from ml.runtime.events import Epoch

MAX_NUMBERED = 20  # classes up to which the confusion matrix shows numbers


def all_plots(
    outputs: ModelOutputs,
    scores: Scores,
    epochs: Sequence[Epoch],
    best_epoch: int | None,
    pixels_of: Callable[[np.ndarray], np.ndarray],
) -> list[Plot]:
    """All plots; that of cross-validation only if there were folds.

    `pixels_of`: positions among the test scans, int64 [K] → their pixels, uint8 [K, height, width, 3].
    """
    worst = worst_mistakes(outputs)
    pixels = pixels_of(np.array([one.index for one in worst], np.int64)) if worst else np.empty((0, 1, 1, 3), np.uint8)
    folds = cross_validation(scores)
    return [
        learning_curves(epochs, best_epoch),
        confusion_matrix(scores),
        reliability_diagram(outputs, scores),
        roc(outputs, scores),
        precision_recall(outputs, scores),
        mistakes(worst, pixels, scores.held_out),
        *([folds] if folds else []),
    ]


# --- learning --------------------------------------------------------------------------------------------------------


def learning_curves(epochs: Sequence[Epoch], best_epoch: int | None = None) -> Plot:
    """Loss, accuracy and F1 by epoch, and the learning rate if it changes."""
    varies = len({epoch.learning_rate for epoch in epochs}) > 1

    def draw(canvas: Canvas) -> None:
        grid = canvas.add_gridspec(2 if varies else 1, 2, height_ratios=[4, 1.3] if varies else [1])
        loss, share = canvas.add_subplot(grid[0, 0]), canvas.add_subplot(grid[0, 1])
        _lines(loss, epochs, "Cross-entropy (nats)", {"train_loss": "training loss", "val_loss": "validation loss"})
        lines = {
            "train_accuracy": "training accuracy",
            "val_accuracy": "validation accuracy",
            "val_f1": "validation F1",
        }
        _lines(share, epochs, "Accuracy and F1", lines)
        panels = [loss, share]
        if varies:
            panels.append(canvas.add_subplot(grid[1, :]))
            _lines(panels[-1], epochs, "Learning rate", {"learning_rate": ""})
            panels[-1].set_ylim(bottom=0)
        for panel in panels:
            _mark_phases(panel, epochs, best_epoch)
        legend_below(canvas, 110)

    caption = "Loss, accuracy and F1 by epoch. Training figures are taken while learning (dropout, augmentation)."
    return Plot("learning_curves.png", "Learning curves", caption, 9.0, 5.2 if varies else 4.0, draw)


def _lines(axes: Any, epochs: Sequence[Epoch], title: str, names: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.epoch for epoch in epochs]
    looks = zip((BLUE, RED, GREEN), STYLES[:3], "os^", strict=True)
    for (name, label), (colour, style, marker) in zip(names.items(), looks, strict=False):
        values = [np.nan if (value := getattr(epoch, name)) is None else value for epoch in epochs]
        if not np.isnan(values).all():
            axes.plot(
                numbers, values, style, color=colour, marker=marker if len(epochs) <= 30 else "", ms=4, label=label
            )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(alpha=0.3)


def _mark_phases(axes: Any, epochs: Sequence[Epoch], best_epoch: int | None) -> None:
    tuned = [epoch.epoch for epoch in epochs if epoch.phase == "fine_tune"]
    if tuned:
        axes.axvspan(min(tuned) - 0.5, max(tuned) + 0.5, color=ORANGE, alpha=0.15, lw=0, label="fine-tuning")
    if best_epoch is not None:
        axes.axvline(best_epoch, color=GREY, ls=":", lw=1.5, label=f"best epoch ({best_epoch})")


# --- the test scans --------------------------------------------------------------------------------------------------


def confusion_matrix(scores: Scores) -> Plot:
    """Counts of true against predicted classes, and their shares of each row."""

    def draw(canvas: Canvas) -> None:
        counts = np.array(scores.confusion_matrix)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes = canvas.add_subplot()
        names = [folded(name, 12 if len(scores.classes) <= 3 else 16, 36) for name in scores.classes]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="Predicted", ylabel="True")
        axes.set_title(f"{scores.held_out} test scans", fontsize=10)
        turned = {"rotation": 90} if len(names) > 3 else {}
        axes.set_xticks(range(len(names)), names, fontsize=8, **turned)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        if len(names) <= MAX_NUMBERED:
            for (true, predicted), count in np.ndenumerate(counts):
                share = shares[true, predicted]
                text, colour = f"{count}\n{share:.0%}", "white" if share > 0.5 else "black"
                axes.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=9)

    side = float(np.clip(2.8 + 0.6 * len(scores.classes), 4.2, 10))
    caption = "Test scans by true and predicted class: counts, and their share of the true class (the row)."
    return Plot("confusion_matrix.png", "Confusion matrix", caption, side, side, draw)


def mistakes(found: Sequence[Mistake], pixels: np.ndarray, tested: int) -> Plot:
    """The misclassified test scans with the highest confidence; `pixels`: uint8 [len(found), height, width, 3]."""
    rows = max(1, -(-len(found) // 4))

    def draw(canvas: Canvas) -> None:
        if not found:
            canvas.text(0.5, 0.5, f"No mistake among {tested} test scans.", ha="center", va="center", fontsize=12)
            return
        panels = canvas.subplots(rows, 4, squeeze=False).ravel()
        for panel in panels:
            panel.set_axis_off()
        for panel, one, scan in zip(panels, found, pixels, strict=False):
            panel.imshow(_thumbnail(scan))
            words = f"no. {one.index}: {shown(one.true, 20)}\npredicted {shown(one.predicted, 18)}\n"
            panel.set_title(f"{words}confidence {one.confidence:.2f}", fontsize=7)

    caption = "Misclassified test scans, most confident first, with their index in the test set."
    height = 2.6 * rows if found else 1.2
    return Plot("mistakes.png", "Worst mistakes", caption, 8.0, height, draw)


def cross_validation(scores: Scores) -> Plot | None:
    """The figures of each fold, with mean and standard deviation; None without cross-validation."""
    folds = scores.cross_validation
    if not folds:
        return None
    names = [name for name in ("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc") if name in folds["mean"]]

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for x, name in enumerate(names):
            values = [fold[name] for fold in folds["folds"] if fold.get(name) is not None]
            spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]
            axes.plot(x + np.asarray(spread), values, "o", color=BLUE, mfc="none", ms=5)
            if folds["mean"][name] is not None:
                deviation = folds["std"].get(name) or 0.0
                axes.errorbar(x, folds["mean"][name], deviation, fmt="_", color=RED, ms=26, mew=2, capsize=6)
        axes.set_xticks(range(len(names)), [_NAMES[name] for name in names])
        axes.grid(alpha=0.3, axis="y")

    caption = (
        f"{len(folds['folds'])}-fold cross-validation: each fold's figures (circles), mean and standard deviation."
    )
    return Plot("cross_validation.png", "Cross-validation", caption, 8.0, 3.2, draw)


_NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
}


def _thumbnail(pixels: np.ndarray, side: int = 224) -> np.ndarray:
    """A large scan with fewer pixels, to keep the report small."""
    step = max(1, max(pixels.shape[:2]) // side)
    return pixels[::step, ::step]
