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
"""Bins of a histogram at most; there is one bin per ten studies, but at least two."""
CONFIDENCE = "confidence"
_TOLERANCE = {CONFIDENCE: 0.01} | {name: meaning.tolerance for name, meaning in MEANINGS.items()}


def drift_reference(
    statistics: Sequence[Mapping[str, float]],
    confidences: Sequence[float],
    labels: Sequence[str],
    classes: Sequence[str],
    rejected: int | None,
    groups: np.ndarray,
) -> dict[str, Any]:
    """The `reference` of the `evaluated` event: scans, studies, statistics, classes and (if known) rejected.

    `statistics`, `confidences` and predicted `labels` are of the same scans. `rejected`: how many of them were out of
    distribution; None, and no such key, if the network has no OOD detector. `groups`: int [scans], equal for scans that
    belong together, such as those of a patient; `studies` says as how many independent cases they count. A value x
    belongs to bin bisect_right(edges, x); a bin may be empty if many scans have the same value.
    """
    values = {name: [one[name] for one in statistics] for name in MEANINGS} | {CONFIDENCE: list(confidences)}
    predicted = Counter(labels)
    studies = effective_groups(groups)
    reference = {
        "scans": len(labels),
        "studies": studies,
        "statistics": {name: _histogram(name, each, studies) for name, each in values.items()},
        "classes": {name: predicted[name] for name in classes},
    }
    return reference if rejected is None else reference | {"rejected": rejected}


def effective_groups(groups: np.ndarray) -> float:
    """As how many groups of equal size these count, if the scans of a group are all alike (Kish 1965, "Survey
    Sampling"): (sum of k)^2 / sum of k^2 over groups of k scans."""
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _histogram(name: str, values: Sequence[float], studies: float) -> dict[str, list[float]]:
    edges = _edges(values, _TOLERANCE[name], studies)
    counts = Counter(bisect_right(edges, value) for value in values)
    return {"edges": edges, "counts": [counts[number] for number in range(len(edges) + 1)]}


def _edges(values: Sequence[float], tolerance: float, studies: float) -> list[float]:
    """Strictly increasing inner edges at the quantiles.

    No value lies below an edge at the minimum, so later values could not be distinguished if all values are equal (the
    colour of grey scans). Such an edge is moved up by the tolerance of the statistic.
    """
    bins = min(BINS, max(2, int(studies) // 10))
    quantiles, lowest = np.quantile(values, np.arange(1, bins) / bins), min(values)
    return np.unique(np.where(quantiles <= lowest, lowest + tolerance, quantiles)).tolist()  # type: ignore[no-any-return]
