"""The reference that drift is measured against: histograms of the test scans, as the network sees and calls them.

Test scans, since nothing was fitted to them: what they show is what a network meets in use, if nothing has changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ml.image.pixels.statistics import MEANINGS

BINS = 10
"""Of a histogram, at most; and at most one for ten scans, at least two."""
CONFIDENCE = "confidence"
_TOLERANCE = {CONFIDENCE: 0.01} | {name: meaning.tolerance for name, meaning in MEANINGS.items()}


def reference_of(
    statistics: Sequence[Mapping[str, float]],
    confidences: Sequence[float],
    labels: Sequence[str],
    classes: Sequence[str],
    rejected: int | None,
) -> dict[str, Any]:
    """For the `evaluated` event: see the keys below.

    `statistics`, `confidences` and called `labels` are of the same scans, of which so many were `rejected`: None,
    and no such key, where the network cannot tell. A value x is in bin bisect_right(edges, x). A bin may hold
    none of these scans, where many have the same value.
    """
    values = {name: [one[name] for one in statistics] for name in MEANINGS} | {CONFIDENCE: list(confidences)}
    called = Counter(labels)
    found = {
        "scans": len(labels),
        "statistics": {name: _histogram(name, each) for name, each in values.items()},
        "classes": {name: called[name] for name in classes},
    }
    return found if rejected is None else found | {"rejected": rejected}


def _histogram(name: str, values: Sequence[float]) -> dict[str, list[float]]:
    edges = _edges(values, _TOLERANCE[name])
    counts = Counter(bisect_right(edges, value) for value in values)
    return {"edges": edges, "counts": [counts[number] for number in range(len(edges) + 1)]}


def _edges(values: Sequence[float], tolerance: float) -> list[float]:
    """Inner edges at the quantiles, in strictly rising order.

    An edge at the lowest value would leave nothing below it, and where all values are equal (the colour of grey scans)
    nothing apart from what comes later: it is moved up by what does not matter.
    """
    bins = min(BINS, max(2, len(values) // 10))
    quantiles, lowest = np.quantile(values, np.arange(1, bins) / bins), min(values)
    return np.unique(np.where(quantiles <= lowest, lowest + tolerance, quantiles)).tolist()  # type: ignore[no-any-return]
