"""Two networks on the same scans: is the new one worse? Paired tests whose units are groups (patients), not slices.

A difference on the same scans is known far better than either figure, since both find the same scans hard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import erfc, sqrt
from typing import Any

import numpy as np

from ml.evaluation.intervals import (
    CONFUSED_RANK,
    MIN_GROUPS,
    Decisions,
    figures,
    groups_per_class,
    resamples,
    strata,
    t_quantile,
)

FIGURES = ("f1", "roc_auc")
LEAST = 0.06
"""Weight of the group on which only one of the two networks is wrong, in groups; chosen for coverage of small sets."""


@dataclass(frozen=True)
class Difference:
    """The new network's figure less the other's, with a 95 % interval; None with fewer than `MIN_GROUPS` groups."""

    ours: float
    theirs: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Test:
    """A statistic with a chi-squared distribution of one degree of freedom if both are equally good, and its p."""

    statistic: float
    p: float


def paired(ours: Decisions, theirs: Decisions, seed: int) -> dict[str, Any]:
    """What a promotion gate compares: `groups`, `differences` of F1 and ROC-AUC, `mcnemar`, and `delong` or None.

    Both have the same labels and groups. Plain JSON types.
    """
    area = None if ours.positive is None else delong(ours, theirs)
    return {
        "groups": len(np.unique(ours.groups)),
        "differences": {name: asdict(each) for name, each in differences(ours, theirs, seed).items()},
        "mcnemar": asdict(mcnemar(ours, theirs)),
        "delong": area and asdict(area),
    }


def differences(ours: Decisions, theirs: Decisions, seed: int) -> dict[str, Difference]:
    """F1's and ROC-AUC's differences. A figure that is not defined is left out.

    Whole groups are drawn, of each class as many as there are (bootstrap, Efron 1979), the same ones for both networks.
    The samples' standard error, enlarged by n / (n - 1) for the fewest groups n of a class, gives an interval with t of
    n - 1 degrees of freedom. Its least value is what one more group changes on which only one of the two is wrong.
    """
    one = np.ones((1, len(ours.labels)))
    points = [figures(one, decisions) for decisions in (ours, theirs)]
    fewest = min(groups_per_class(ours))
    known = [name for name in FIGURES if not any(np.isnan(each[name][0]) for each in points)]
    reaches = _reaches(ours, theirs, seed, fewest) if fewest >= MIN_GROUPS else {}
    found = {}
    for name in known:
        mine, other = (float(each[name][0]) for each in points)
        reach = reaches.get(name)
        bounds = (None, None) if reach is None else (mine - other - reach, mine - other + reach)
        found[name] = Difference(mine, other, mine - other, *bounds)
    return found


def mcnemar(ours: Decisions, theirs: Decisions) -> Test:
    """McNemar's test of equal error rates for groups of several scans (Durkalski et al., Stat. Med. 22, 2003).

    Each group counts once, by the share of its scans on which only one of the two is right. With groups of one scan it
    is McNemar's (1947), without a correction for continuity.
    """
    groups = np.unique(ours.groups, return_inverse=True)[1]
    right = (ours.predicted == ours.labels).astype(float) - (theirs.predicted == theirs.labels)
    of_group = np.bincount(groups, right) / np.bincount(groups)
    return _test(float(of_group.sum()), float((of_group**2).sum()))


def delong(ours: Decisions, theirs: Decisions) -> Test | None:
    """The test of equal areas under the ROC curve of DeLong et al. (1988), for groups as in Obuchowski (1997).

    Only for two classes. None if one of them has no scans, or fewer than two groups.
    """
    positive, groups = ours.labels == ours.positive, np.unique(ours.groups, return_inverse=True)[1]
    if min(len(np.unique(groups[side])) for side in (positive, ~positive)) < 2:
        return None
    mine, other = (_placements(each, positive) for each in (ours, theirs))
    gap = float(mine[positive].mean() - other[positive].mean())
    variance, parts = 0.0, []
    for side in (positive, ~positive):
        of_group = np.bincount(groups[side], mine[side] - other[side] - gap, groups.max() + 1) / side.sum()
        count = len(np.unique(groups[side]))
        variance += count / (count - 1) * float((of_group**2).sum())
        parts.append(of_group)
    count = groups.max() + 1
    variance += 2 * count / (count - 1) * float((parts[0] * parts[1]).sum())  # of groups with scans of both classes
    return _test(gap, variance)


def _test(difference: float, variance: float) -> Test:
    if variance <= 0:
        return Test(0.0, 1.0)
    statistic = difference**2 / variance
    return Test(statistic, erfc(sqrt(statistic / 2)))


def _placements(decisions: Decisions, positive: np.ndarray) -> np.ndarray:
    """Of each scan, the share of the other class's scans that are ranked on its right side; ties count half."""
    score = decisions.margins[:, decisions.positive or 0]
    placements = np.empty(len(score))
    for side, sign in ((positive, 1.0), (~positive, -1.0)):
        others = np.sort(sign * score[~side])
        below = [np.searchsorted(others, sign * score[side], edge) for edge in ("left", "right")]  # type: ignore[call-overload]
        placements[side] = (below[0] + below[1]) / 2 / len(others)
    return placements


def _reaches(ours: Decisions, theirs: Decisions, seed: int, fewest: int) -> dict[str, float]:
    samples: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
    for weights in resamples(ours, seed):
        mine, other = figures(weights, ours), figures(weights, theirs)
        for name, parts in samples.items():
            parts.append(mine[name] - other[name])
    least = _least_variances(ours, theirs)
    spread = {name: float(np.nanvar(np.concatenate(parts))) for name, parts in samples.items()}
    return {
        name: t_quantile(fewest - 1) * sqrt(max(variance * fewest / (fewest - 1), least[name]))
        for name, variance in spread.items()
    }


def _least_variances(ours: Decisions, theirs: Decisions) -> dict[str, float]:
    """By what the differences change if one group of a class, of mean size, is taken for another by one of the two."""
    _, members = strata(ours)
    totals = dict.fromkeys(FIGURES, 0.0)
    for label, groups in members.items():
        scans = np.flatnonzero(ours.labels == label)
        share = 1 / len(groups)
        for decisions in (ours, theirs):
            before = figures(np.ones((1, len(ours.labels))), decisions)
            after = _with_one_wrong(decisions, scans, share)
            for name in FIGURES:
                totals[name] += LEAST * float(after[name][0] - before[name][0]) ** 2
    return totals


def _with_one_wrong(decisions: Decisions, scans: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """The figures with `share` of a class's scans once more, taken for the class that follows it."""
    label = int(decisions.labels[scans[0]])
    margins = decisions.margins.min(axis=0)
    margins[label] = np.quantile(decisions.margins[decisions.labels != label, label], 1 - CONFUSED_RANK)
    taken_for = (label + 1) % decisions.classes
    of_other = decisions.margins[decisions.labels == taken_for, taken_for]
    margins[taken_for] = np.quantile(of_other, CONFUSED_RANK) if len(of_other) else 0.0
    more = Decisions(
        np.append(decisions.labels, label),
        np.append(decisions.predicted, taken_for),
        np.vstack([decisions.margins, margins]),
        np.append(decisions.groups, decisions.groups.max() + 1),
        decisions.positive,
    )
    return figures(np.append(np.ones(len(decisions.labels)), share * len(scans))[None], more)
