"""Figures by subgroup of the test scans, such as those of one scanner, and which of them differ from the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ml.evaluation.intervals import Decisions
from ml.spec.operating_point import MIN_GROUPS, share

ALPHA = 0.05
"""Probability of any warning if no subgroup differs (Holm 1979)."""
TOO_FEW = "too few to say"
TITLES = {"accuracy": "Accuracy", "recall": "Sensitivity", "specificity": "Specificity"}


@dataclass(frozen=True)
class Subgroup:
    """The test scans of which a trait has one value, and their number of independent groups.

    `figures`: accuracy, and with a positive class recall (sensitivity) and specificity: value, low and high of its 95 %
    interval; None with fewer than `MIN_GROUPS` groups. `warning`: how it differs from the other scans; else None.
    """

    trait: str
    value: str
    scans: int
    groups: int
    figures: dict[str, list[float] | None]
    warning: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Contrast:
    """A figure of a subgroup beside that of the scans that have another value: p of the test that they are equal."""

    index: int
    figure: str
    inside: float
    outside: float
    p: float


def subgroups(decisions: Decisions, traits: Sequence[Mapping[str, str]]) -> list[Subgroup]:
    """Each value of each trait, in the order of their names.

    `traits`: of each test scan, trait → value; all scans have the same traits.
    """
    names = sorted({name for one in traits for name in one})
    found: list[tuple[Subgroup, np.ndarray]] = []
    for name in names:
        values = np.array([one[name] for one in traits])
        for value in np.unique(values):
            inside = values == value
            found.append((_measured(name, str(value), _part(decisions, inside)), inside))
    warnings = _warnings([one for one, _ in found], [inside for _, inside in found], decisions)
    return [Subgroup(**{**vars(one), "warning": warnings.get(index)}) for index, (one, _) in enumerate(found)]


def _part(decisions: Decisions, inside: np.ndarray) -> Decisions:
    return Decisions(
        decisions.labels[inside], decisions.predicted[inside], decisions.margins[inside], decisions.groups[inside],
        decisions.positive,
    )  # fmt: skip


def _measured(trait: str, value: str, part: Decisions) -> Subgroup:
    told = {name: _figure(part, scans) for name, scans in _denominators(part).items()}
    return Subgroup(trait, value, len(part.labels), _groups(part, np.ones(len(part.labels), bool)), told)


def _figure(part: Decisions, scans: np.ndarray) -> list[float] | None:
    """The share of these scans, bool [N], that is right, with its interval."""
    right = part.predicted[scans] == part.labels[scans]
    found = share([*zip(right.tolist(), part.groups[scans].tolist(), strict=True)])
    values = [value for value in (found.value, found.low, found.high) if value is not None]
    return values if len(values) == 3 else None


def _denominators(part: Decisions) -> dict[str, np.ndarray]:
    """The scans, bool [N], of which each figure is a proportion."""
    whole = {"accuracy": np.ones(len(part.labels), dtype=bool)}
    if part.positive is None:
        return whole
    is_positive = part.labels == part.positive
    return {**whole, "recall": is_positive, "specificity": ~is_positive}


def _groups(part: Decisions, scans: np.ndarray) -> int:
    return len(np.unique(part.groups[scans]))


# --- which of them differ --------------------------------------------------------------------------------------------


def _warnings(found: Sequence[Subgroup], masks: Sequence[np.ndarray], decisions: Decisions) -> dict[int, str]:
    """Index of the subgroup → what differs. Of two values of a trait, the worse one is told.

    Accuracy is not compared where there are sensitivity and specificity: it differs wherever the classes are mixed
    differently.
    """
    contrasts = [
        contrast for index in range(len(found)) for contrast in _contrasts(index, masks[index], decisions)
    ]  # fmt: skip
    texts: dict[int, list[str]] = {}
    for one in _significant(contrasts):
        subgroup = found[one.index]
        if one.inside > one.outside and sum(other.trait == subgroup.trait for other in found) == 2:
            continue  # the other value's warning says the same
        than = "lower" if one.inside < one.outside else "higher"
        title = TITLES[one.figure]
        texts.setdefault(one.index, []).append(f"{title} {one.inside:.2f}, {than} than {one.outside:.2f} elsewhere.")
    return {index: " ".join(lines) for index, lines in texts.items()}


def _contrasts(index: int, inside: np.ndarray, decisions: Decisions) -> list[_Contrast]:
    """The comparisons that both sides have enough groups for."""
    correct = decisions.predicted == decisions.labels
    made = []
    for name, whole in _denominators(decisions).items():
        sides = [whole & inside, whole & ~inside]
        is_compared = name != "accuracy" or decisions.positive is None
        if is_compared and all(_groups(decisions, side) >= MIN_GROUPS for side in sides):
            samples = [_sample(correct[side], decisions.groups[side]) for side in sides]
            made.append(_Contrast(index, name, samples[0].rate, samples[1].rate, _p_value(*samples)))
    return made


@dataclass(frozen=True)
class _Sample:
    """A proportion over scans of groups, and as how many independent scans they count."""

    rate: float
    scans: float
    groups: int


def _sample(correct: np.ndarray, groups: np.ndarray) -> _Sample:
    """The proportion of correct scans; their independent number is that of Rao & Scott (1992).

    The variance between groups is that of a ratio (Cochran 1977, section 6.3). If all scans or none are correct,
    nothing tells how alike a group's scans are: each group then counts as one.
    """
    rate = float(correct.mean())
    numbers = np.unique(groups, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    residuals = np.bincount(numbers, weights=correct - rate)
    variance = count / (count - 1) * float((residuals**2).sum()) / len(correct) ** 2
    if rate * (1 - rate) == 0 or variance == 0:
        return _Sample(rate, count, count)
    return _Sample(rate, float(np.clip(rate * (1 - rate) / variance, 1, len(correct))), count)


def _p_value(first: _Sample, second: _Sample) -> float:
    """Of two proportions, two-sided: a success and a failure are added on either side (Agresti & Caffo 2000), and the
    distribution is Student's t, with the degrees of freedom of Welch (1947) for the numbers of groups."""
    from scipy.special import stdtr

    rates = [(one.rate * one.scans + 1) / (one.scans + 2) for one in (first, second)]
    variances = [rate * (1 - rate) / (one.scans + 2) for rate, one in zip(rates, (first, second), strict=True)]
    freedom = sum(variances) ** 2 / sum(
        variance**2 / (one.groups - 1) for variance, one in zip(variances, (first, second), strict=True)
    )
    return float(2 * stdtr(freedom, -abs(rates[0] - rates[1]) / sum(variances) ** 0.5))


def _significant(contrasts: Sequence[_Contrast]) -> list[_Contrast]:
    """Those that differ at the level ALPHA for all of them together (Holm 1979)."""
    kept = []
    for number, one in enumerate(sorted(contrasts, key=lambda each: each.p)):
        if one.p > ALPHA / (len(contrasts) - number):
            break
        kept.append(one)
    return sorted(kept, key=lambda each: (each.index, each.figure))
