"""Figures of merit and their 95 % intervals, by the same code: each row of weights gives a value of each figure.

`figures` counts each scan as often as its weight says. Weights of 1 give the estimate, weights of 0 leave a group out,
the counts of a resample give that sample's figure. So an estimate and its interval always have the same definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ml.spec.operating_point import MIN_GROUPS, PSEUDO

CONFUSED_RANK = 0.4
"""A pseudo-group that is wrong ranks at this quantile of the class that it is taken for, not beyond all of it."""
MAX_BLOCKS = 200
"""Groups of a class are left out one by one; of more groups, as many random blocks are."""
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
    """A 95 % interval and its method: jackknife."""

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
    """95 % intervals of all `figures`; None if a figure is not defined, or a class has fewer than `MIN_GROUPS` groups.

    Groups are the independent units, since slices of a patient are not. Each figure is computed anew without each group
    (stratified jackknife: Wolter, Introduction to Variance Estimation, 2007, ch. 4). That gives its variance, and with
    Satterthwaite's rule (1946) the degrees of freedom of Student's t: G - 1 for a figure of one class. The interval is
    Wilson's, of the effective number of cases that have this variance (Franco, Little, Louis and Slud, Comparative
    study of confidence intervals for proportions in complex sample surveys, 2019).

    Where all groups of a class are right, a jackknife sees no variance, though the next group may be wrong. So each
    class gets pseudo-groups of the weight `PSEUDO`, one right and one wrong, in the way of Agresti and Coull (1998).
    The variance is computed with them, and what one of them changes is its least value for the class.

    `make bench-coverage` measures how often these intervals contain the truth.
    """
    decisions = _sorted(decisions)
    estimates = {
        name: float(values[0]) for name, values in figures(np.ones((1, len(decisions.labels))), decisions).items()
    }
    if min(groups_per_class(decisions)) < MIN_GROUPS:
        return dict.fromkeys(estimates)
    spreads = _spreads(decisions, seed)
    return {name: None if np.isnan(value) else _interval(value, *spreads[name]) for name, value in estimates.items()}


def groups_per_class(decisions: Decisions) -> list[int]:
    """The number of independent groups of each class. A group with scans of several counts for that of most."""
    counts = {label: len(groups) for label, groups in strata(decisions)[1].items()}
    return [counts.get(label, 0) for label in range(decisions.classes)]


def t_quantile(freedom: float, probability: float = 0.975) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def wilson(rate: float, count: float, z: float = _Z) -> tuple[float, float]:
    """Wilson's interval (1927) for a proportion `rate` of `count` independent cases; 95 % if `z` is left out."""
    centre = rate + z**2 / (2 * count)
    spread = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    low, high = (float((centre + side * spread) / (1 + z**2 / count)) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _interval(estimate: float, centre: float, variance: float, freedom: float) -> Interval:
    """Wilson's interval with t in place of z, of as many cases as have this variance at `centre`."""
    count, t = centre * (1 - centre) / variance, t_quantile(freedom)
    low, high = wilson(estimate, count, t)
    return Interval(min(low, estimate), max(high, estimate), "jackknife")


def _spreads(decisions: Decisions, seed: int) -> dict[str, tuple[float, float, float]]:
    """Each figure's centre, variance and degrees of freedom."""
    groups, members = strata(decisions)
    whole, weights, sizes = _with_pseudo_groups(decisions, groups, members)
    real, random = len(groups), np.random.default_rng(seed)
    added = np.tile((np.arange(len(weights)) < real).astype(np.float64), (len(weights) - real + 1, 1))
    added[1:, real:] += np.diag(sizes)
    changes = {name: (values[1:] - values[0]) ** 2 for name, values in figures(added, whole).items()}
    by_class: list[tuple[int, dict[str, float]]] = []
    for label, its_groups in members.items():
        blocks = np.array_split(random.permutation(its_groups), min(len(its_groups), MAX_BLOCKS))
        least = weights[real:] / sizes * (whole.labels[real:] == label)
        without = jackknife(whole, weights, groups, blocks)
        by_class.append(
            (len(blocks) - 1, {name: max(float(v), float(changes[name] @ least)) for name, v in without.items()})
        )
    centres = figures(weights[None], whole)
    return {name: (float(centre[0]), *_pooled(by_class, name)) for name, centre in centres.items()}


def jackknife(decisions: Decisions, weights: np.ndarray, groups: np.ndarray, blocks: Sequence[np.ndarray]) -> Figures:
    """The variance of each figure between the samples that lack one block of one class's groups each.

    `groups`: int [n], of the first n of `weights` [N], behind which pseudo-groups follow.
    """
    block_of = np.full(groups.max() + 1, -1)
    for number, block in enumerate(blocks):
        block_of[block] = number
    of_scan = np.concatenate([block_of[groups], np.full(len(weights) - len(groups), -1)])
    sizes, parts = np.array([len(block) for block in blocks]), []
    rows = max(1, CHUNK // len(weights))
    for start in range(0, len(blocks), rows):
        numbers = np.arange(start, min(start + rows, len(blocks)))[:, None]
        kept = np.where(of_scan == numbers, 0.0, weights)
        scale = sizes.sum() / (sizes.sum() - sizes[numbers])
        parts.append(figures(np.where(of_scan >= 0, kept * scale, kept), decisions))
    left_out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    factor = (len(blocks) - 1) ** 2 / len(blocks)
    return {name: np.asarray(factor * values.var(ddof=1)) for name, values in left_out.items()}


def _pooled(by_class: Sequence[tuple[int, Mapping[str, float]]], name: str) -> tuple[float, float]:
    """The sum of the classes' variances, and its degrees of freedom."""
    parts = [(freedom, float(variances[name])) for freedom, variances in by_class]
    total = sum(variance for _, variance in parts)
    return total, total**2 / sum(variance**2 / freedom for freedom, variance in parts)


def _with_pseudo_groups(
    decisions: Decisions, groups: np.ndarray, members: Mapping[int, np.ndarray]
) -> tuple[Decisions, np.ndarray, np.ndarray]:
    """The decisions with pseudo-groups of one scan behind them, all weights, and each pseudo-group's scans.

    Of each class: one that is right, and one for each class that it may be taken for.
    """
    kinds = [(label, taken_for) for label in members for taken_for in members]
    labels, predicted = (np.array(each, dtype=np.int64) for each in zip(*kinds, strict=True))
    sizes = np.array([np.isin(groups, members[label]).sum() / len(members[label]) for label in labels])
    share = np.where(labels == predicted, PSEUDO, PSEUDO / max(1, len(members) - 1))
    whole = replace(
        decisions,
        labels=np.concatenate([decisions.labels, labels]),
        predicted=np.concatenate([decisions.predicted, predicted]),
        margins=np.concatenate([decisions.margins, [_pseudo_margins(decisions, *kind) for kind in kinds]]),
        groups=np.concatenate([groups, groups.max() + 1 + np.arange(len(kinds))]),
    )
    return whole, np.concatenate([np.ones(len(groups)), share * sizes]), sizes


def _pseudo_margins(decisions: Decisions, label: int, taken_for: int) -> np.ndarray:
    """As far apart as any scan's; those of a wrong one rank amid the classes that it confuses."""
    margins = decisions.margins.min(axis=0)
    if label == taken_for:
        margins[label] = decisions.margins[:, label].max()
        return margins
    others, theirs = decisions.labels != label, decisions.labels == taken_for
    margins[label] = np.quantile(decisions.margins[others, label], 1 - CONFUSED_RANK)
    margins[taken_for] = np.quantile(decisions.margins[theirs, taken_for], CONFUSED_RANK)
    return np.asarray(margins)


def strata(decisions: Decisions) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Each scan's group, renumbered from 0, and for each class the groups in which it is the majority."""
    groups = np.unique(decisions.groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, decisions.classes), np.int64)
    np.add.at(counts, (groups, decisions.labels), 1)
    mostly = counts.argmax(axis=1)
    return groups, {int(label): np.flatnonzero(mostly == label) for label in np.unique(mostly)}


def resamples(decisions: Decisions, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap weights (Efron 1979) in chunks, [rows, N] each: how often each scan is in a sample.

    Whole groups are drawn, as many of each class as the test set has, because its split is stratified too.
    """
    groups, members = strata(decisions)
    scans, random = len(groups), np.random.default_rng(seed)
    left = int(np.clip(MAX_WORK / (scans * decisions.classes), MIN_RESAMPLES, RESAMPLES))
    while left:
        rows = min(left, max(1, CHUNK // scans))
        counts = np.zeros((rows, groups.max() + 1))
        for stratum in members.values():
            drawn = random.integers(len(stratum), size=(rows, len(stratum))) + np.arange(rows)[:, None] * len(stratum)
            counts[:, stratum] = np.bincount(drawn.ravel(), minlength=rows * len(stratum)).reshape(rows, -1)
        yield counts[:, groups]
        left -= rows


def _sorted(decisions: Decisions) -> Decisions:
    """The same decisions in a canonical order, so that samples do not depend on the order of the scans."""
    order = np.lexsort((*decisions.margins.T, decisions.predicted, decisions.labels))
    groups = decisions.groups[order]
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return Decisions(
        decisions.labels[order], decisions.predicted[order], decisions.margins[order], rank[inverse], decisions.positive
    )
