"""The reference for drift monitoring: histograms of the test scans' input statistics, confidences and labels.

Test scans are used because nothing was fitted to them: as long as nothing changes, scans in production look like them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ml.image.pixels.statistics import MEANINGS

BINS = 10
"""Bins of a histogram at most; there is one bin per ten scans, but at least two."""
CONFIDENCE = "confidence"
_TOLERANCE = {CONFIDENCE: 0.01} | {name: meaning.tolerance for name, meaning in MEANINGS.items()}


def drift_reference(
    statistics: Sequence[Mapping[str, float]],
    confidences: Sequence[float],
    labels: Sequence[str],
    classes: Sequence[str],
    rejected: int | None,
) -> dict[str, Any]:
    """The `reference` of the `evaluated` event: scans, statistics, classes and (if known) rejected.

    `statistics`, `confidences` and predicted `labels` are of the same scans. `rejected`: how many of them were out of
    distribution; None, and no such key, if the network has no OOD detector. A value x belongs to bin
    bisect_right(edges, x); a bin may be empty if many scans have the same value.
    """
    values = {name: [one[name] for one in statistics] for name in MEANINGS} | {CONFIDENCE: list(confidences)}
    predicted = Counter(labels)
    reference = {
        "scans": len(labels),
        "statistics": {name: _histogram(name, each) for name, each in values.items()},
        "classes": {name: predicted[name] for name in classes},
    }
    return reference if rejected is None else reference | {"rejected": rejected}


def _histogram(name: str, values: Sequence[float]) -> dict[str, list[float]]:
    edges = _edges(values, _TOLERANCE[name])
    counts = Counter(bisect_right(edges, value) for value in values)
    return {"edges": edges, "counts": [counts[number] for number in range(len(edges) + 1)]}


def _edges(values: Sequence[float], tolerance: float) -> list[float]:
    """Strictly increasing inner edges at the quantiles.

    No value lies below an edge at the minimum, so later values could not be distinguished if all values are equal (the
    colour of grey scans). Such an edge is moved up by the tolerance of the statistic.
    """
    bins = min(BINS, max(2, len(values) // 10))
    quantiles, lowest = np.quantile(values, np.arange(1, bins) / bins), min(values)
    return np.unique(np.where(quantiles <= lowest, lowest + tolerance, quantiles)).tolist()  # type: ignore[no-any-return]
