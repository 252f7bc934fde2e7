"""95 % bands of ROC and precision–recall curves: bootstrap over groups, point by point."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from ml.evaluation.intervals import Decisions, ranked, resamples
from ml.spec.operating_point import MIN_GROUPS

SAMPLES = 500
GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class Bands:
    """Bounds at `GRID`, [2, 101] each: of the sensitivity by 1 − specificity, and of the precision by recall."""

    roc: np.ndarray
    precision: np.ndarray


def curve_bands(decisions: Decisions, index: int, seed: int) -> Bands | None:
    """The bands of one class against all others; None with fewer than `MIN_GROUPS` groups on a side.

    The sensitivity is averaged vertically (Fawcett 2006): its quantiles at the same share of false alarms. The bounds
    are percentiles of the samples, so a curve that no sample changes has a band without width.
    """
    truth, ranking = decisions.labels == index, decisions.margins[:, index]
    if min(len(np.unique(decisions.groups[side])) for side in (truth, ~truth)) < MIN_GROUPS:
        return None
    samples = islice(chain.from_iterable(resamples(decisions, seed)), SAMPLES)
    curves = [_curves(*ranked(row[None], truth, ranking)) for row in samples]
    roc, precision = (np.nanquantile([curve[side] for curve in curves], [0.025, 0.975], axis=0) for side in (0, 1))
    return Bands(roc, precision)


def _curves(hits: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and precision at `GRID`; NaN where the sample has no scans of a class."""
    found, alarms = hits[0], false[0]
    if not found[-1] or not alarms[-1]:
        return np.full(len(GRID), np.nan), np.full(len(GRID), np.nan)
    recall = found / found[-1]
    sensitivity = np.interp(GRID, np.append(0, alarms / alarms[-1]), np.append(0, recall))
    first = np.searchsorted(recall, np.maximum(GRID, 1e-12) - 1e-12)  # of the thresholds with at least this recall
    called = found + alarms
    precision = np.divide(found, called, out=np.full(len(called), np.nan), where=called > 0)
    return sensitivity, precision[first]
