"""Plots of scores against truths: ROC, precision and recall, reliability."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from ml.evaluation.bands import GRID, Bands, curve_bands
from ml.evaluation.calibration import BINS, bin_of, reliability, softmax, top_label
from ml.evaluation.intervals import Decisions, ranked, wilson
from ml.evaluation.metrics import ModelOutputs, Scores, calibration_of, decide, finding
from ml.reporting.drawing import BLUE, COLOURS, GREY, RED, STYLES, Canvas, Plot, legend_below, shown

MAX_CURVES = 8  # ROC or PR curves in one plot
MAX_BANDS = 3  # with more of them nothing can be told apart
_BANDS = " Shaded: 95 % of the curves of resampled patients (or groups of scans), point by point."


def roc(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Sensitivity against 1 − specificity; a cross marks the chosen threshold."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for name, truth, ranking, look, bands in _one_against_rest(outputs, scores, "roc_auc"):
            hits, false = (np.append(0, counts[0]) for counts in ranked(np.ones((1, len(truth))), truth, ranking))
            axes.plot(false / false[-1], hits / hits[-1], label=f"AUC {name}", **look)
            if bands:
                axes.fill_between(GRID, *bands.roc, color=look["color"], alpha=0.15, lw=0)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="by chance")
        if scores.specificity is not None:
            _operating_point(axes, 1 - scores.specificity, scores.recall, scores)
        axes.set(xlabel="1 − specificity", ylabel="Sensitivity", title="ROC")
        _square(axes)
        legend_below(canvas)

    caption = f"Sensitivity against the share of false alarms, for every threshold. Cross: the chosen one.{_BANDS}"
    return Plot("roc.png", "ROC curve", caption, 4.8, _height(scores), draw)


def precision_recall(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Precision against recall; a dotted line shows the result of guessing."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for name, truth, ranking, look, bands in _one_against_rest(outputs, scores, "pr_auc"):
            hits, false = (counts[0] for counts in ranked(np.ones((1, len(truth))), truth, ranking))
            recall, precision = np.append(0, hits / hits[-1]), hits / (hits + false)
            axes.plot(recall, np.append(precision[0], precision), drawstyle="steps-pre", label=f"AP {name}", **look)
            axes.axhline(truth.mean(), color=look["color"], lw=0.8, ls=":")
            if bands:
                axes.fill_between(GRID, *bands.precision, color=look["color"], alpha=0.15, lw=0, step="pre")
        if scores.positive:
            _operating_point(axes, scores.recall, scores.precision, scores)
        axes.set(xlabel="Recall (sensitivity)", ylabel="Precision", title="Precision and recall")
        _square(axes)
        legend_below(canvas)

    caption = f"Precision against recall, for every threshold. Dotted: what guessing reaches.{_BANDS}"
    return Plot("pr.png", "Precision–recall curve", caption, 4.8, _height(scores), draw)


def _height(scores: Scores) -> float:
    """Room for a square and, below it, the legend."""
    curves = 1 if scores.positive else min(len(scores.classes), MAX_CURVES)
    return 5.2 + 0.24 * curves


def _one_against_rest(
    outputs: ModelOutputs, scores: Scores, figure: str
) -> Iterable[tuple[str, np.ndarray, np.ndarray, dict[str, Any], Bands | None]]:
    """(area and class, truth, ranking, line style, bands) of the positive classes; without any, of the worst ones."""
    calibration = calibration_of(outputs)
    decisions = decide(outputs, calibration)
    areas = {name: area for name, one in scores.per_class.items() if (area := one[figure]) is not None}
    kept = [(name, outputs.classes.index(name)) for name in sorted(areas, key=lambda name: areas[name])[:MAX_CURVES]]
    if scores.positive:
        decisions = finding(decisions, outputs, calibration)
        together, area = " or ".join(scores.positive), getattr(scores, figure)
        areas, kept = {together: area}, [] if area is None else [(together, decisions.positive or 0)]
    for number, (name, index) in enumerate(kept):
        look = {"color": COLOURS[number % len(COLOURS)], "ls": STYLES[number % len(STYLES)], "lw": 1.6}
        bands = _bands(outputs, index) if len(kept) <= MAX_BANDS else None
        yield f"{areas[name]:.3f}: {shown(name)}", decisions.labels == index, decisions.margins[:, index], look, bands


@lru_cache(maxsize=MAX_BANDS)
def _bands(outputs: ModelOutputs, index: int) -> Bands | None:
    """Computed once for both curves, in all formats. `index`: of a class, or of the positive ones as one finding."""
    calibration = calibration_of(outputs)
    decisions = decide(outputs, calibration)
    return curve_bands(finding(decisions, outputs, calibration), index, outputs.seed)


def _operating_point(axes: Any, x: float, y: float, scores: Scores) -> None:
    label = f"threshold {scores.threshold:.2f}"
    axes.plot([x], [y], marker="X", ms=10, mec="white", color="black", ls="", label=label, zorder=5, clip_on=False)


def _square(axes: Any) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.3)


def reliability_diagram(outputs: ModelOutputs, scores: Scores) -> Plot:
    """Accuracy by confidence, before and after temperature scaling, above a histogram of the confidences."""
    sides = (
        ("before", 1.0, scores.ece_before, {"color": RED, "marker": "s", "ls": "--"}),
        ("after", scores.temperature, scores.ece, {"color": BLUE, "marker": "o", "ls": "-"}),
    )

    def draw(canvas: Canvas) -> None:
        above, histogram = canvas.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="perfect")
        for name, temperature, error, look in sides:
            right, confidence = top_label(outputs.test_labels, softmax(outputs.test_logits, temperature))
            bins = reliability(right, confidence)
            above.plot(bins.confidence, bins.accuracy, label=f"{name}: ECE {error:.3f}", lw=1, ms=5, **look)
            histogram.hist(confidence, np.linspace(0, 1, BINS + 1), histtype="step", color=look["color"], ls=look["ls"])
        decisions = decide(outputs, calibration_of(outputs))
        low, high = reliability_bounds(decisions, confidence, bins.accuracy)
        above.vlines(bins.confidence, low, high, color=BLUE, lw=1, alpha=0.6)
        above.set(title="Calibration", ylabel="Accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.05))
        histogram.set(xlabel="Confidence", ylabel="Scans")
        for panel in (above, histogram):
            panel.grid(alpha=0.3)
        legend_below(canvas)

    caption = (
        "Accuracy by confidence, before and after temperature scaling "
        f"(T = {scores.temperature:.2f}), with 95 % intervals by patient (or group of scans) of the latter. "
        f"A perfectly calibrated network would have ECE {scores.ece_chance:.3f} by chance."
    )
    return Plot("reliability.png", "Reliability diagram", caption, 4.8, 5.1, draw)


def reliability_bounds(
    decisions: Decisions, confidence: np.ndarray, accuracy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's intervals of the accuracy of each non-empty bin: [bins] each. The groups in a bin count, not its scans.

    `confidence`: of the top label, [N]; `accuracy`: of the non-empty bins, in their order.
    """
    index = bin_of(confidence)
    groups = [len(np.unique(decisions.groups[index == number])) for number in np.unique(index)]
    bounds = np.array([wilson(float(rate), count) for rate, count in zip(accuracy, groups, strict=True)])
    return np.minimum(bounds[:, 0], accuracy), np.maximum(bounds[:, 1], accuracy)
