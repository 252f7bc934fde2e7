"""How unlike a scan is to those that a network has learnt from: its out-of-distribution score.

A network answers whatever it is shown, a photograph as surely as a kidney. So two things are compared with the training
scans: the descriptor that the network itself has of the scan (ml.image.networks.descriptor), and its input
statistics. Each is taken for normally distributed around a subspace (probabilistic PCA, Tipping and Bishop 1999),
and the Mahalanobis distance to that (Lee et al. 2018) divided by a limit. The larger of the two quotients is the
score: above 1 the scan is rejected.

A limit that the training scans themselves gave would be too near: what a distribution was fitted to lies closer to it
than anything else. So they are distances of scans whose groups (patients, copies) were left out of the fit, in turns.
Their number decides how far the limit lies beyond them: the fewer, the farther. But a backbone that was fine-tuned has
learnt from all of these scans, also from those that a fit leaves out. So the limit of descriptors is at least what the
validation scans say, which no weight was fitted to.

What is stored depends on the network, not on the dataset: at most 225 kB in the model file's metadata, most of it axes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ml.image.pixels.statistics import MEANINGS

SHARE = 0.02
"""Of proper scans that are rejected: half of it by each of the two distances."""
LEAST_SCANS, LEAST_GROUPS = 20, 10
"""Training scans (of each fit, also of one that leaves some out) and groups of them below which nobody can say what is
unlike them."""
LEAST_UNSEEN = 5
"""Groups of unseen scans, below which these say nothing of the limit."""
FOLDS = 5
AXES = 32
"""Of a descriptor's subspace, at most; and at most one for ten scans."""
FLOOR = 0.1
"""Of the mean spread, added in quadrature to that of each number in a descriptor: what hardly moved in training, or an
engine's rounding, would else be blown up until it drowns the others."""
NOTABLE = 3.0
"""Standard deviations from which on one input statistic explains a rejection."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """A normal distribution of vectors [width]: free along some orthogonal axes, round in all other directions.

    `mean`, `scale` [width]: what vectors are standardized by; `axes` [axes, width], `variances` [axes] and the variance
    of each other direction, `rest`, are of standardized ones.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def fit(cls, values: np.ndarray, axes: int, floor: np.ndarray | float) -> Distribution:
        """Of `values` [n, width]. `floor`, one for all or [width], is added in quadrature to their standard deviations,
        and its mean to the variance in every direction: also where no value moved at all."""
        mean = values.mean(axis=0)
        scale = np.hypot(values.std(axis=0), floor)
        standardized = (values - mean) / scale
        directions, variances = _principal(standardized, axes)
        least = float(((floor / scale) ** 2).mean())
        beside = (standardized**2).sum() / (len(values) - 1) - variances.sum()
        rest = float(beside / (values.shape[1] - axes)) + least
        return cls(mean, scale, directions, variances + least, rest)

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Mahalanobis distances float64 [n] of vectors [n, width], as root mean square over the directions."""
        standardized = (values - self.mean) / self.scale
        along = standardized @ self.axes.T
        beside = np.maximum((standardized**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        squares = (along**2 / self.variances).sum(axis=1) + beside / self.rest
        return np.asarray(np.sqrt(squares / len(self.mean)), np.float64)


def _principal(values: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes [axes, width] of centred values [n, width], and the variances along them. By the smaller of the
    two products of the values with themselves: for 512 scans of 2048 numbers a decomposition of these takes 20 times
    as long."""
    from scipy.linalg import eigh

    by_scan, freedom = values.shape[0] < values.shape[1], len(values) - 1
    product = (values @ values.T if by_scan else values.T @ values) / freedom
    last = len(product) - 1
    variances, vectors = eigh(product, subset_by_index=[last - axes + 1, last])
    variances = np.maximum(variances, 1e-12)
    directions = vectors.T @ values / np.sqrt(variances * freedom)[:, None] if by_scan else vectors.T
    return directions, variances


@dataclass(frozen=True, eq=False)
class Limited:
    """A distribution and how far a vector may lie from it."""

    distribution: Distribution
    limit: float

    def quotients(self, values: np.ndarray) -> np.ndarray:
        """Distances over the limit, float64 [n]."""
        return self.distribution.distances(values) / self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON; arrays as base64."""
        of = self.distribution
        arrays = {name: _text(getattr(of, name)) for name in ("mean", "scale", "axes", "variances")}
        return {**arrays, "rest": of.rest, "limit": self.limit}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Limited:
        """The reverse of `as_dict`."""
        mean, scale, variances = (_array(fields[name]) for name in ("mean", "scale", "variances"))
        axes = _array(fields["axes"]).reshape(len(variances), len(mean))
        return cls(Distribution(mean, scale, axes, variances, float(fields["rest"])), float(fields["limit"]))


@dataclass(frozen=True, eq=False)
class Outliers:
    """What the score of a network's scans needs: the distributions of descriptors and of input statistics.

    `shifts`: how far the rounding of int8, say, moves all descriptors from where they were when they were learnt,
    float32 [width] by the engine's form. It is much the same for every scan, and may be as large as the differences
    between them. A form that moves none is left out.
    """

    descriptors: Limited
    statistics: Limited
    shifts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Outliers | None:
        """As a model file carries them; None where it carries none, as one of an earlier version."""
        if (fields := metadata.get("outliers")) is None:
            return None
        shifts = {form: _array(text) for form, text in fields["shifts"].items()}
        return cls(Limited.from_dict(fields["descriptors"]), Limited.from_dict(fields["statistics"]), shifts)

    def through(self, form: str) -> Outliers:
        """The same, for descriptors of an engine of this form."""
        moved = self.descriptors.distribution.mean + self.shifts.get(form, 0)
        distribution = replace(self.descriptors.distribution, mean=moved)
        return replace(self, descriptors=replace(self.descriptors, distribution=distribution))

    def as_dict(self) -> dict[str, Any]:
        """For a model file's metadata."""
        shifts = {form: _text(shift) for form, shift in self.shifts.items()}
        return {"descriptors": self.descriptors.as_dict(), "statistics": self.statistics.as_dict(), "shifts": shifts}

    def scores(self, descriptors: np.ndarray, statistics: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Float64 [n]: above 1 where a scan is unlike what was learnt from. `descriptors`: [n, width]."""
        pairs = self.descriptors.quotients(descriptors), self.statistics.quotients(table(statistics))
        return np.maximum(*pairs)

    def oddity(self, statistics: Mapping[str, float]) -> str | None:
        """The input statistic that sets a scan apart, in words; None where no single one does."""
        values, of = table([statistics]), self.statistics.distribution
        if self.statistics.quotients(values)[0] <= 1:
            return None
        away = ((values - of.mean) / of.scale)[0]
        place = int(np.abs(away).argmax())
        if abs(away[place]) < NOTABLE:
            return None
        meaning = list(MEANINGS.values())[place]
        return meaning.more if away[place] > 0 else meaning.less


def table(statistics: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Input statistics as float64 [n, 6]."""
    return np.array([[one[name] for name in MEANINGS] for one in statistics])


@dataclass(frozen=True, eq=False)
class Unseen:
    """Descriptors [n, width] of scans that no weight of the network was fitted to, and these scans' groups [n]."""

    descriptors: np.ndarray
    groups: np.ndarray


def learn(
    descriptors: np.ndarray,
    statistics: Sequence[Mapping[str, float]],
    groups: np.ndarray,
    unseen: Unseen | None = None,
) -> Outliers | None:
    """What training scans are like: descriptors [n, width], their input statistics, and int groups [n] that are equal
    for scans of one patient or of one picture. None where there are too few of them, or nearly all of one group."""
    smallest = len(groups) - int(np.bincount(_folds(groups), minlength=FOLDS).max())
    if smallest < LEAST_SCANS or len(np.unique(groups)) < LEAST_GROUPS:
        return None
    axes = min(AXES, smallest // 10)
    floor = FLOOR * float(np.sqrt(descriptors.var(axis=0).mean())) + 1e-12
    tolerances = np.array([meaning.tolerance for meaning in MEANINGS.values()])
    near = _limited(descriptors.astype(np.float64), groups, lambda values: Distribution.fit(values, axes, floor))
    if unseen is not None and (independent := len(np.unique(unseen.groups))) >= LEAST_UNSEEN:
        away = near.distribution.distances(unseen.descriptors.astype(np.float64))
        near = replace(near, limit=max(near.limit, _limit(away, independent)))
    usual = _limited(table(statistics), groups, lambda values: Distribution.fit(values, len(MEANINGS) - 1, tolerances))
    return Outliers(near, usual)


def _limited(values: np.ndarray, groups: np.ndarray, fit: Callable[[np.ndarray], Distribution]) -> Limited:
    fold = _folds(groups)
    left_out = np.empty(len(values))
    for number in range(FOLDS):
        mine = fold == number
        left_out[mine] = fit(values[~mine]).distances(values[mine])
    return Limited(fit(values), _limit(left_out, len(np.unique(groups))))


def _folds(groups: np.ndarray) -> np.ndarray:
    """The fold, int64 [n], that leaves a scan's group out."""
    return np.unique(groups, return_inverse=True)[1] % FOLDS


def _limit(distances: np.ndarray, independent: int) -> float:
    """The distance that a proper scan exceeds in half of `SHARE` of all cases.

    Two answers, and the larger one counts: the prediction bound of a normal distribution of the logarithms, which knows
    that few scans tell little; and the quantile of the distances as they are, which knows of heavy tails.
    """
    from scipy.stats import t

    logs, beyond = np.log(distances + 1e-12), SHARE / 2
    far = t.ppf(1 - beyond, independent - 1) * np.sqrt(1 + 1 / independent)
    return float(max(np.exp(logs.mean() + far * logs.std(ddof=1)), np.quantile(distances, 1 - beyond)))


def _text(values: np.ndarray) -> str:
    """float16 is enough for axes, whose numbers are all below 1; means and scales keep float32."""
    kind = np.float16 if values.ndim == 2 else np.float32
    return f"{np.dtype(kind).name}:{base64.b64encode(values.astype(kind).tobytes()).decode()}"


def _array(text: str) -> np.ndarray:
    kind, _, content = text.partition(":")
    return np.frombuffer(base64.b64decode(content), np.dtype(kind)).astype(np.float32)
