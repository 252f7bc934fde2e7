"""Figures of merit and their 95 % intervals, all of them by the same lines: one row of weights is one bootstrap sample.

`figures` counts each scan as often as its weight says. Weights of 1 give the estimate, a resample's counts give that
resample's figure; so an estimate and its interval cannot be of two definitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
FEWER = 6e7  # resamples × scans × classes beyond which fewer resamples are drawn, but at least LEAST
LEAST = 200
AT_ONCE = 2**15  # weights at a time: resamples × scans; what fits in the cache is four times as fast
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile

Figures = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a network said of N scans. `margins`: log-odds of each class against all others, [N, classes].

    `positive`: index of the positive class of two; None: macro means. `groups`: int [N], who belongs together.
    """

    labels: np.ndarray
    predicted: np.ndarray
    margins: np.ndarray
    groups: np.ndarray
    positive: int | None

    @property
    def classes(self) -> int:
        """How many there are, with or without test scans."""
        return self.margins.shape[1]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and the method that it is of: bootstrap or wilson."""

    low: float
    high: float
    method: str


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(weights: np.ndarray, made: Decisions) -> Figures:
    """Name → [rows] for weights [rows, N]; NaN where a figure is not defined, as an AUC without a second class.

    accuracy, and precision, recall, f1, roc_auc, pr_auc, specificity of the positive class; or, without the last, their
    macro means over the classes that have scans. A precision of nothing called so is 0, as everywhere.
    """
    accuracy = weights @ (made.predicted == made.labels) / weights.sum(axis=1)
    if made.positive is None:
        each = per_class(weights, made, range(made.classes))
        return {"accuracy": accuracy, **{name: _mean(values) for name, values in each.items()}}
    chosen = {name: values[:, 0] for name, values in per_class(weights, made, [made.positive]).items()}
    negative = (made.labels != made.positive).astype(np.float64)
    spared = weights @ (negative * (made.predicted != made.positive))
    return {"accuracy": accuracy, "specificity": _share(spared, weights @ negative), **chosen}


def per_class(weights: np.ndarray, made: Decisions, classes: Sequence[int]) -> Figures:
    """precision, recall, f1, roc_auc, pr_auc of these classes, each against all others: [rows, len(classes)]."""
    is_true, is_called = (values[:, None] == np.asarray(classes) for values in (made.labels, made.predicted))
    right, true, called = (weights @ kind.astype(np.float64) for kind in (is_true & is_called, is_true, is_called))
    curves = [_areas(weights, made.labels == index, made.margins[:, index]) for index in classes]
    return {
        "precision": np.where(true > 0, _ratio(right, called), np.nan),
        "recall": _share(right, true),
        "f1": np.where(true > 0, _ratio(2 * right, true + called), np.nan),
        "roc_auc": np.stack([area for area, _ in curves], axis=1),
        "pr_auc": np.stack([area for _, area in curves], axis=1),
    }


def ranked(weights: np.ndarray, truth: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of true and false positives from each distinct value of `ranking` on, highest first: [rows, values]."""
    order = np.argsort(-ranking, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(ranking[order])), len(order) - 1)  # the last of each set of ties
    sorted_weights, sorted_truth = weights[:, order], truth[order]
    hits = np.cumsum(sorted_weights * sorted_truth, axis=1)[:, ends]
    return hits, np.cumsum(sorted_weights * ~sorted_truth, axis=1)[:, ends]


def _areas(weights: np.ndarray, truth: np.ndarray, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve (ties count half) and average precision, [rows] each; NaN without both kinds."""
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
    """The mean of each row's defined values; NaN where there is none."""
    defined = ~np.isnan(values)
    return _share(np.nansum(values, axis=1), defined.sum(axis=1))


# --- intervals -------------------------------------------------------------------------------------------------------


def intervals(made: Decisions, seed: int) -> dict[str, Interval | None]:
    """95 % intervals of all `figures`; None for one that is not defined.

    The bootstrap (Efron 1979) of whole groups, since slices of a patient come and go together. A sample has as many
    groups of each class as the test set: the split is stratified too. Its standard error makes a normal interval of the
    figure's log-odds. In 1000 simulated tests of 93 scans that held the true AUC in 95 %, percentiles of these samples
    in 87 % (30 patients, 10 slices each: 88 and 81 %), because what is nearly 1 errs to one side.

    A figure that no sample changes, as where all is right, would get "exactly 1": it gets Wilson's interval (1927).
    """
    made = _in_order(made)
    estimates = {name: float(values[0]) for name, values in figures(np.ones((1, len(made.labels))), made).items()}
    drawn = [figures(weights, made) for weights in resamples(made, seed)]
    together = {name: np.concatenate([part[name] for part in drawn]) for name in estimates}
    return {name: _interval(name, estimates[name], together[name], made) for name in estimates}


def resamples(made: Decisions, seed: int) -> Iterator[np.ndarray]:
    """Weights [rows, N], in parts that fit in memory: how often each scan is in a sample."""
    groups, strata = _strata(made)
    scans, random = len(groups), np.random.default_rng(seed)
    left = int(np.clip(FEWER / (scans * made.classes), LEAST, RESAMPLES))
    while left:
        rows = min(left, max(1, AT_ONCE // scans))
        counts = np.zeros((rows, groups.max() + 1))
        for members in strata:
            lots = random.integers(len(members), size=(rows, len(members))) + np.arange(rows)[:, None] * len(members)
            counts[:, members] = np.bincount(lots.ravel(), minlength=rows * len(members)).reshape(rows, -1)
        yield counts[:, groups]
        left -= rows


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `rate` of `count` independent cases."""
    centre = rate + _Z**2 / (2 * count)
    spread = _Z * np.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    low, high = (float((centre + side * spread) / (1 + _Z**2 / count)) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _interval(name: str, estimate: float, samples: np.ndarray, made: Decisions) -> Interval | None:
    samples = samples[~np.isnan(samples)]
    if np.isnan(estimate) or not len(samples):
        return None
    if np.ptp(samples) < 1e-12 or not 0 < estimate < 1:
        low, high = wilson(estimate, _independent(_denominator(name, made), made))
        return Interval(min(low, estimate), max(high, estimate), "wilson")
    centre = np.log(estimate / (1 - estimate))
    reach = _Z * samples.std() / (estimate * (1 - estimate))
    low, high = (float(1 / (1 + np.exp(-(centre + side * reach)))) for side in (-1, 1))
    return Interval(low, high, "bootstrap")


def _denominator(name: str, made: Decisions) -> np.ndarray | None:
    """The scans, bool [N], that a figure is a plain share of; None where it is none."""
    if name == "accuracy":
        return np.ones(len(made.labels), dtype=bool)
    if made.positive is None:
        return None
    shares = {"precision": made.predicted == made.positive, "recall": made.labels == made.positive}
    return {**shares, "specificity": made.labels != made.positive}.get(name)


def _independent(scans: np.ndarray | None, made: Decisions) -> int:
    """Groups among `scans`, at least 1.

    For what is no share: those of the rarest class. F1 and the areas are at least about q where a share q of that class
    is told apart from all others; so n of n being so speaks for q as n of n heads speak for a coin.
    """
    if scans is not None:
        return max(1, len(np.unique(made.groups[scans])))
    return min(len(np.unique(made.groups[made.labels == label])) for label in np.unique(made.labels))


def _strata(made: Decisions) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each scan's group as 0…, and for each class the groups most of whose scans are of it."""
    groups = np.unique(made.groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, made.classes), np.int64)
    np.add.at(counts, (groups, made.labels), 1)
    mostly = counts.argmax(axis=1)
    return groups, [np.flatnonzero(mostly == label) for label in np.unique(mostly)]


def _in_order(made: Decisions) -> Decisions:
    """The same decisions in an order that depends on them alone, so that the caller's order draws no other samples."""
    order = np.lexsort((*made.margins.T, made.predicted, made.labels))
    groups = made.groups[order]
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return Decisions(made.labels[order], made.predicted[order], made.margins[order], rank[inverse], made.positive)
