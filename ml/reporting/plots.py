"""Plots of a training and its scores, as PNG files and for the pages of the report.

matplotlib is imported on first use, since that takes half a second. Colours are Okabe and Ito's, which are colour-blind
safe; lines also differ in style, for print.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ml.evaluation.calibration import BINS, Calibration, reliability, softmax, top_label
from ml.evaluation.intervals import ranked
from ml.evaluation.metrics import Mistake, ModelOutputs, Scores, log_odds, worst_mistakes
from ml.evaluation.positive import indices
from ml.runtime.events import Epoch

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black")
_STYLES = ("-", "--", "-.", ":")
MAX_CURVES = 8  # ROC or PR curves in one plot
MAX_NUMBERED = 20  # classes up to which the confusion matrix shows numbers
DPI = 130

Canvas = Any  # a matplotlib Figure or SubFigure


@dataclass(frozen=True)
class Plot:
    """One plot: `name` of its PNG file, title and caption, size in inches, and a function that draws it."""

    name: str
    title: str
    caption: str
    width: float
    height: float
    draw: Callable[[Canvas], None]

    @cached_property
    def png(self) -> bytes:
        """The content of the PNG file, drawn on first use. The same plot gives the same bytes."""
        # Figure without pyplot: no global state, no display, the Agg canvas.
        from matplotlib.figure import Figure

        figure, sink = Figure(figsize=(self.width, self.height), layout="constrained"), io.BytesIO()
        self.draw(figure)
        figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
        return sink.getvalue()

    def save(self, folder: Path) -> Path:
        """Write the PNG into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        path.write_bytes(self.png)
        return path


def all_plots(
    outputs: ModelOutputs,
    scores: Scores,
    epochs: Sequence[Epoch],
    best_epoch: int | None,
    pixels_of: Callable[[np.ndarray], np.ndarray],
    calibration: Calibration | None = None,
) -> list[Plot]:
    """All plots; that of cross-validation only if there were folds.

    `pixels_of`: positions among the test scans, int64 [K] → their pixels, uint8 [K, height, width, 3]. `calibration`:
    see `ml.evaluation.metrics.score`.
    """
    worst = worst_mistakes(outputs, calibration)
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
        _lines(loss, epochs, "Cross-entropy (nats)", {"train_loss": "training", "val_loss": "validation"})
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
        for panel in panels[:2]:
            if epochs:
                panel.legend(fontsize=8)

    caption = "Loss, accuracy and F1 by epoch. Training figures are taken while learning (dropout, augmentation)."
    return Plot("learning_curves.png", "Learning curves", caption, 9.0, 5.0 if varies else 3.8, draw)


def _lines(axes: Any, epochs: Sequence[Epoch], title: str, names: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.epoch for epoch in epochs]
    looks = zip((BLUE, RED, GREEN), _STYLES[:3], "os^", strict=True)
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
        axes, names = canvas.add_subplot(), [_shown(name) for name in scores.classes]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="Predicted", ylabel="True")
        axes.set_title(f"{scores.held_out} test scans", fontsize=10)
        turned = {"rotation": 40, "ha": "right"} if len(names) > 3 else {}
        axes.set_xticks(range(len(names)), names, **turned)
        axes.set_yticks(range(len(names)), names)
        if len(names) <= MAX_NUMBERED:
            for (true, predicted), count in np.ndenumerate(counts):
                share = shares[true, predicted]
                text, colour = f"{count}\n{share:.0%}", "white" if share > 0.5 else "black"
                axes.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=9)

    side = float(np.clip(3.2 + 0.35 * len(scores.classes), 4.2, 10))
    caption = "Test scans by true and predicted class: counts, and their share of the true class (the row)."
    return Plot("confusion_matrix.png", "Confusion matrix", caption, side, side, draw)


def roc(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Sensitivity against 1 − specificity; a cross marks the chosen threshold."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for name, truth, ranking, look in _one_against_rest(outputs, scores, "roc_auc"):
            hits, false = (np.append(0, counts[0]) for counts in ranked(np.ones((1, len(truth))), truth, ranking))
            axes.plot(false / false[-1], hits / hits[-1], label=f"AUC {name}", **look)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="by chance")
        if scores.specificity is not None:
            _operating_point(axes, 1 - scores.specificity, scores.recall, scores)
        axes.set(xlabel="1 − specificity", ylabel="Sensitivity", title="ROC")
        _square(axes, "lower right")

    caption = "Sensitivity against the share of false alarms, for every threshold. The cross is the chosen threshold."
    return Plot("roc.png", "ROC curve", caption, 4.8, 4.8, draw)


def precision_recall(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Precision against recall; a dotted line shows the result of guessing."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for name, truth, ranking, look in _one_against_rest(outputs, scores, "pr_auc"):
            hits, false = (counts[0] for counts in ranked(np.ones((1, len(truth))), truth, ranking))
            recall, precision = np.append(0, hits / hits[-1]), hits / (hits + false)
            axes.plot(recall, np.append(precision[0], precision), drawstyle="steps-pre", label=f"AP {name}", **look)
            axes.axhline(truth.mean(), color=look["color"], lw=0.8, ls=":")
        if scores.positive:
            _operating_point(axes, scores.recall, scores.precision, scores)
        axes.set(xlabel="Recall (sensitivity)", ylabel="Precision", title="Precision and recall")
        _square(axes, "lower left")

    caption = "Precision against recall, for every threshold. Dotted: the share of the class, which guessing reaches."
    return Plot("pr.png", "Precision–recall curve", caption, 4.8, 4.8, draw)


def _one_against_rest(
    outputs: ModelOutputs, scores: Scores, figure: str
) -> Iterable[tuple[str, np.ndarray, np.ndarray, dict[str, Any]]]:
    """(area and class, truth, ranking, line style) of the positive classes or, without any, of the worst ones."""
    defined = {name: area for name, one in scores.per_class.items() if (area := one[figure]) is not None}
    chosen: list[tuple[str, ...]] = [(name,) for name in sorted(defined, key=lambda name: defined[name])[:MAX_CURVES]]
    if scores.positive:
        chosen = [tuple(scores.positive)] if getattr(scores, figure) is not None else []
    for number, names in enumerate(chosen):
        look = {"color": _COLOURS[number % len(_COLOURS)], "ls": _STYLES[number % len(_STYLES)], "lw": 1.6}
        found = indices(outputs.classes, names)
        area = getattr(scores, figure) if scores.positive else defined[names[0]]
        ranking = log_odds(outputs.test_logits, scores.temperature, found)
        yield f"{area:.3f}: {_shown(' or '.join(names))}", np.isin(outputs.test_labels, found), ranking, look


def _operating_point(axes: Any, x: float, y: float, scores: Scores) -> None:
    label = f"threshold {scores.threshold:.2f}"
    axes.plot([x], [y], marker="X", ms=10, mec="white", color="black", ls="", label=label, zorder=5, clip_on=False)


def _square(axes: Any, place: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, fontsize=8)


def reliability_diagram(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Accuracy by confidence, before and after temperature scaling, above a histogram of the confidences."""
    sides = (
        ("before", 1.0, scores.ece_before, {"color": RED, "marker": "s", "ls": "--"}),
        ("after", scores.temperature, scores.ece, {"color": BLUE, "marker": "o", "ls": "-"}),
    )

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="perfect")
        for name, temperature, error, look in sides:
            right, confidence = top_label(outputs.test_labels, softmax(outputs.test_logits, temperature))
            bins = reliability(right, confidence)
            above.plot(bins.confidence, bins.accuracy, label=f"{name}: ECE {error:.3f}", lw=1, ms=5, **look)
            sizes = 20 + 180 * bins.scans / bins.scans.max()  # bins with few scans are less reliable
            above.scatter(bins.confidence, bins.accuracy, sizes, look["color"], marker=look["marker"], alpha=0.3, lw=0)
            below.hist(confidence, np.linspace(0, 1, BINS + 1), histtype="step", color=look["color"], ls=look["ls"])
        above.set(title="Calibration", ylabel="Accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.05))
        above.legend(loc="upper left", fontsize=8)
        below.set(xlabel="Confidence", ylabel="Scans")
        for panel in (above, below):
            panel.grid(alpha=0.3)

    caption = (
        "Accuracy by confidence, before and after temperature scaling "
        f"(T = {scores.temperature:.2f}); larger marks are more scans. "
        f"A perfectly calibrated network would have ECE {scores.ece_chance:.3f} by chance."
    )
    return Plot("reliability.png", "Reliability diagram", caption, 4.8, 4.8, draw)


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
            words = f"no. {one.index}: {_shown(one.true, 18)}\npredicted {_shown(one.predicted, 18)}\n"
            panel.set_title(f"{words}confidence {one.confidence:.2f}", fontsize=7.5)

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


def _shown(name: str, longest: int = 22) -> str:
    """A class name as a label: short, on one line, and with dollars escaped for matplotlib."""
    line = " ".join(name.split())
    short = line if len(line) <= longest else line[: longest - 1] + "…"
    return short.replace("$", r"\$")


def _thumbnail(pixels: np.ndarray, side: int = 224) -> np.ndarray:
    """A large scan with fewer pixels, to keep the report small."""
    step = max(1, max(pixels.shape[:2]) // side)
    return pixels[::step, ::step]
