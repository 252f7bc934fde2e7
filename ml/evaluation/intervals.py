"""Figures of merit and their 95 % intervals, by the same code: a row of weights is a bootstrap sample.

`figures` counts each scan as often as its weight says. Weights of 1 give the estimate, the counts of a resample give
that sample's figure. So an estimate and its interval always have the same definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
MAX_WORK = 6e7  # resamples × scans × classes; beyond it fewer resamples are drawn, but at least MIN_RESAMPLES
MIN_RESAMPLES = 200
CHUNK = 2**15  # weights per chunk: resamples × scans; four times as fast if it fits in the CPU's cache
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile

Figures = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Decisions:
    """A network's decisions for N scans: `labels` and `predicted`, int [N].

    `margins`: log-odds of each class against all others, [N, classes]. `groups`: int [N], equal for scans that belong
    together. `positive`: index of the positive class of two; None: macro means over the classes.
    """

    labels: np.ndarray
    predicted: np.ndarray
    margins: np.ndarray
    groups: np.ndarray
    positive: int | None

    @property
    def classes(self) -> int:
        """The number of classes, including those without test scans."""
        return self.margins.shape[1]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and its method: bootstrap or wilson."""

    low: float
    high: float
    method: str


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(weights: np.ndarray, decisions: Decisions) -> Figures:
    """Figures by name, [rows] each, for weights [rows, N]; NaN if one is not defined, such as an AUC with one class.

    accuracy; precision, recall, f1, roc_auc, pr_auc and specificity of the positive class, or (without specificity)
    their macro means over the classes with scans. A precision without predicted scans is 0, as in scikit-learn.
    """
    accuracy = weights @ (decisions.predicted == decisions.labels) / weights.sum(axis=1)
    if decisions.positive is None:
        each = per_class(weights, decisions, range(decisions.classes))
        return {"accuracy": accuracy, **{name: _mean(values) for name, values in each.items()}}
    chosen = {name: values[:, 0] for name, values in per_class(weights, decisions, [decisions.positive]).items()}
    negative = (decisions.labels != decisions.positive).astype(np.float64)
    spared = weights @ (negative * (decisions.predicted != decisions.positive))
    return {"accuracy": accuracy, "specificity": _share(spared, weights @ negative), **chosen}


def per_class(weights: np.ndarray, decisions: Decisions, classes: Sequence[int]) -> Figures:
    """precision, recall, f1, roc_auc and pr_auc of these classes, each against all others: [rows, len(classes)]."""
    is_true, is_predicted = (
        values[:, None] == np.asarray(classes) for values in (decisions.labels, decisions.predicted)
    )
    correct, true, predicted = (
        weights @ kind.astype(np.float64) for kind in (is_true & is_predicted, is_true, is_predicted)
    )
    curves = [_areas(weights, decisions.labels == index, decisions.margins[:, index]) for index in classes]
    return {
        "precision": np.where(true > 0, _ratio(correct, predicted), np.nan),
        "recall": _share(correct, true),
        "f1": np.where(true > 0, _ratio(2 * correct, true + predicted), np.nan),
        "roc_auc": np.stack([area for area, _ in curves], axis=1),
        "pr_auc": np.stack([area for _, area in curves], axis=1),
    }


def ranked(weights: np.ndarray, truth: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of true and of false positives at each distinct threshold of `ranking`, highest first: [rows, values]."""
    order = np.argsort(-ranking, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(ranking[order])), len(order) - 1)  # the last one of equal values
    sorted_weights, sorted_truth = weights[:, order], truth[order]
    hits = np.cumsum(sorted_weights * sorted_truth, axis=1)[:, ends]
    return hits, np.cumsum(sorted_weights * ~sorted_truth, axis=1)[:, ends]


def _areas(weights: np.ndarray, truth: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve (ties count half) and average precision, [rows] each; NaN without both classes."""
    hits, false = ranked(weights, truth, ranking)
    positives, negatives = hits[:, -1], false[:, -1]
    new_hits, new_false = (np.diff(counts, axis=1, prepend=0) for counts in (hits, false))
    roc = (new_false * (hits - new_hits / 2)).sum(axis=1)
    precision = (new_hits * _ratio(hits, hits + false)).sum(axis=1)
    return _share(roc, positives * negatives), np.where(negatives > 0, _share(precision, positives), np.nan)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, _ratio(part, whole), np.nan)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of each row's defined values; NaN if there is none."""
    defined = ~np.isnan(values)
    return _share(np.nansum(values, axis=1), defined.sum(axis=1))


# --- intervals -------------------------------------------------------------------------------------------------------


def intervals(decisions: Decisions, seed: int) -> dict[str, Interval | None]:
    """95 % intervals of all `figures`; None if a figure is not defined.

    Whole groups are bootstrapped (Efron 1979), since slices of a patient are not independent. A sample has as many
    groups of each class as the test set, because the split is stratified too. The standard error of the samples gives a
    normal interval for the log-odds of the figure. In 1000 simulated tests of 93 scans it contained the true AUC in
    95 %, while the percentile bootstrap did in 87 % (with 30 patients of 10 slices: 88 and 81 %), because figures near
    1 are skewed.

    A figure that is the same in all samples, for example if all scans are correct, gets Wilson's interval (1927).
    """
    decisions = _sorted(decisions)
    estimates = {
        name: float(values[0]) for name, values in figures(np.ones((1, len(decisions.labels))), decisions).items()
    }
    chunks = [figures(weights, decisions) for weights in resamples(decisions, seed)]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in estimates}
    return {name: _interval(name, estimates[name], samples[name], decisions) for name in estimates}


def resamples(decisions: Decisions, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap weights in chunks, [rows, N] each: how often each scan is in a sample."""
    groups, strata = _strata(decisions)
    scans, random = len(groups), np.random.default_rng(seed)
    left = int(np.clip(MAX_WORK / (scans * decisions.classes), MIN_RESAMPLES, RESAMPLES))
    while left:
        rows = min(left, max(1, CHUNK // scans))
        counts = np.zeros((rows, groups.max() + 1))
        for stratum in strata:
            drawn = random.integers(len(stratum), size=(rows, len(stratum))) + np.arange(rows)[:, None] * len(stratum)
            counts[:, stratum] = np.bincount(drawn.ravel(), minlength=rows * len(stratum)).reshape(rows, -1)
        yield counts[:, groups]
        left -= rows


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a proportion `rate` of `count` independent cases."""
    centre = rate + _Z**2 / (2 * count)
    spread = _Z * np.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    low, high = (float((centre + side * spread) / (1 + _Z**2 / count)) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _interval(name: str, estimate: float, samples: np.ndarray, decisions: Decisions) -> Interval | None:
    samples = samples[~np.isnan(samples)]
    if np.isnan(estimate) or not len(samples):
        return None
    if np.ptp(samples) < 1e-12 or not 0 < estimate < 1:
        low, high = wilson(estimate, _independent(_denominator(name, decisions), decisions))
        return Interval(min(low, estimate), max(high, estimate), "wilson")
    centre = np.log(estimate / (1 - estimate))
    reach = _Z * samples.std() / (estimate * (1 - estimate))
    low, high = (float(1 / (1 + np.exp(-(centre + side * reach)))) for side in (-1, 1))
    return Interval(low, high, "bootstrap")


def _denominator(name: str, decisions: Decisions) -> np.ndarray | None:
    """The scans, bool [N], of which a figure is a proportion; None if it is no proportion."""
    if name == "accuracy":
        return np.ones(len(decisions.labels), dtype=bool)
    if decisions.positive is None:
        return None
    shares = {"precision": decisions.predicted == decisions.positive, "recall": decisions.labels == decisions.positive}
    return {**shares, "specificity": decisions.labels != decisions.positive}.get(name)


def _independent(scans: np.ndarray | None, decisions: Decisions) -> int:
    """The number of groups among `scans`, at least 1.

    For figures that are no proportion (`scans` None), those of the rarest class. F1 and the areas are at least about q
    if a share q of that class is separated from all others, so n of n separated scans are evidence for q like n of n
    heads for a coin.
    """
    if scans is not None:
        return max(1, len(np.unique(decisions.groups[scans])))
    return min(len(np.unique(decisions.groups[decisions.labels == label])) for label in np.unique(decisions.labels))


def _strata(decisions: Decisions) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each scan's group, renumbered from 0, and for each class the groups in which it is the majority."""
    groups = np.unique(decisions.groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, decisions.classes), np.int64)
    np.add.at(counts, (groups, decisions.labels), 1)
    mostly = counts.argmax(axis=1)
    return groups, [np.flatnonzero(mostly == label) for label in np.unique(mostly)]


def _sorted(decisions: Decisions) -> Decisions:
    """The same decisions in a canonical order, so that samples do not depend on the order of the scans."""
    order = np.lexsort((*decisions.margins.T, decisions.predicted, decisions.labels))
    groups = decisions.groups[order]
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return Decisions(
        decisions.labels[order], decisions.predicted[order], decisions.margins[order], rank[inverse], decisions.positive
    )
