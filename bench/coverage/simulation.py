"""How often 95 % intervals contain the truth: simulated test sets of many sizes, scored as evaluations score them.

Scores are binormal: of a patient's slices, `rho` of the variance is the patient's own. Separation, threshold and `rho`
are drawn anew for each test set, so that a row is a mean over networks from poor to nearly perfect (Agresti and Coull
1998 compare intervals by this mean; with few groups no interval holds 95 % at each single truth). The truth is known in
closed form, but for macro means of three classes, which come from 30,000 patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import ndtr

from ml.evaluation.intervals import Decisions, figures, intervals

LEAST, MOST = 92.0, 98.0
"""Percent of intervals that shall contain the truth."""


@dataclass(frozen=True)
class Size:
    """A test set: patients of each class, and slices of each patient; `vary`: from one slice to as many."""

    patients: tuple[int, ...]
    slices: int
    vary: bool = False

    def __str__(self) -> str:
        upto = "1 to " if self.vary else ""
        return f"{' + '.join(map(str, self.patients))} patients of {upto}{self.slices}"


SIZES = (
    *(Size((groups // 2, groups // 2), slices) for groups in (2, 6, 18) for slices in (1, 40)),
    *(Size((groups // 2, groups // 2), slices) for groups in (20, 40, 100, 200) for slices in (1, 6, 40)),
    *(Size((rest, rare), slices) for rest, rare in ((190, 10), (90, 10), (180, 20)) for slices in (1, 10, 40)),
    Size((10, 10), 40, vary=True), Size((30, 15), 20, vary=True), Size((60, 60), 40, vary=True),
    Size((10, 10, 10), 1), Size((10, 10, 10), 10), Size((30, 30, 30), 6), Size((60, 30, 12), 4),
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """What is drawn for a test set: separation of the classes, threshold, and the patient's share of the variance."""

    separation: float
    threshold: float
    rho: float

    @classmethod
    def drawn(cls, random: np.random.Generator) -> Network:
        """From an AUC of 0.8 to 0.998, at thresholds up to 0.4 off the middle."""
        separation = random.uniform(1.2, 4.2)
        return cls(separation, separation / 2 + random.uniform(-0.4, 0.4), random.uniform(0.1, 0.9))


# --- one test set ----------------------------------------------------------------------------------------------------


def drawn(size: Size, network: Network, random: np.random.Generator) -> Decisions:
    """A test set and the network's decisions for it."""
    of_patient = np.repeat(np.arange(len(size.patients)), size.patients)
    least = 1 if size.vary else size.slices
    slices = random.integers(least, size.slices + 1, len(of_patient))
    groups = np.repeat(np.arange(len(of_patient)), slices)
    labels, axes = of_patient[groups], 1 if len(size.patients) == 2 else len(size.patients)
    own, each = random.standard_normal((len(of_patient), axes))[groups], random.standard_normal((len(groups), axes))
    noise = sqrt(network.rho) * own + sqrt(1 - network.rho) * each
    if axes == 1:
        score = network.separation * labels + noise[:, 0] - network.threshold
        return Decisions(labels, (score >= 0).astype(np.int64), np.stack([-score, score], axis=1), groups, 1)
    scores = network.separation / sqrt(2) * np.eye(axes)[labels] + noise
    others = [np.delete(scores, index, axis=1).max(axis=1) for index in range(axes)]
    return Decisions(labels, scores.argmax(axis=1), scores - np.stack(others, axis=1), groups, None)


def truth(size: Size, network: Network) -> dict[str, float]:
    """The figures on infinitely many patients of the same classes' shares."""
    if len(size.patients) > 2:
        return _simulated(size, network)
    share = size.patients[1] / sum(size.patients)
    recall, specificity = (float(ndtr(x)) for x in (network.separation - network.threshold, network.threshold))
    found, alarms = share * recall, (1 - share) * (1 - specificity)
    at = np.linspace(network.separation + 9, -9, 20_001)
    hits, false = (ndtr(shift - at) for shift in (network.separation, 0.0))
    precision = share * hits / np.maximum(share * hits + (1 - share) * false, 1e-300)
    return {
        "accuracy": found + (1 - share) * specificity,
        "specificity": specificity,
        "precision": found / (found + alarms),
        "recall": recall,
        "f1": 2 * found / (found + alarms + share),
        "roc_auc": float(ndtr(network.separation / sqrt(2))),
        "pr_auc": float((np.diff(hits) * (precision[1:] + precision[:-1]) / 2).sum()),
    }


def _simulated(size: Size, network: Network) -> dict[str, float]:
    many = Size(tuple(count * (30_000 // sum(size.patients)) for count in size.patients), 1)
    made = drawn(many, network, np.random.default_rng(1))
    return {name: float(value[0]) for name, value in figures(np.ones((1, len(made.labels))), made).items()}


# --- many ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Of one figure and one size: how many intervals were given, how many held the truth, and their mean width."""

    given: int = 0
    held: int = 0
    width: float = 0.0

    def add(self, low: float, high: float, true: float) -> None:
        """Count one interval."""
        self.width += (high - low - self.width) / (self.given + 1)
        self.given, self.held = self.given + 1, self.held + (low <= true <= high)

    @property
    def coverage(self) -> float | None:
        """In percent; None if no interval was given."""
        return 100 * self.held / self.given if self.given else None


def coverage(size: Size, trials: int, seed: int = 0) -> dict[str, Row]:
    """Each figure's row for `trials` test sets of this size: each of a new network; of three classes, twenty of one."""
    random, rows = np.random.default_rng(seed), dict[str, Row]()
    for trial in range(trials):
        if trial % (1 if len(size.patients) == 2 else 20) == 0:
            network = Network.drawn(random)
            true = truth(size, network)
        for name, found in intervals(drawn(size, network, random), trial).items():
            row = rows.setdefault(name, Row())
            if found is not None:
                row.add(found.low, found.high, true[name])
    return rows
