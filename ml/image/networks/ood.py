"""Out-of-distribution (OOD) detection: a score of how unlike the training scans a scan is.

A network classifies whatever it is shown, a photograph as confidently as a kidney. So two things are compared with the
training scans: the feature descriptor (ml.image.networks.feature_descriptor) and the input statistics. Each is modelled
as a normal distribution around a subspace (probabilistic PCA, Tipping and Bishop 1999). The score is the Mahalanobis
distance (Lee et al. 2018) divided by a limit, the larger of the two quotients; above 1 the scan is rejected.

Scans that a distribution was fitted to lie closer to it than new ones. So limits come from cross-validation: distances
of scans whose groups (patients, copies) were left out of the fit. The fewer groups there are, the larger the margin
beyond these distances. A fine-tuned backbone has learned from all of these scans, though, also from those that a fit
leaves out. So the limit for descriptors is at least what the validation scans suggest, to which no weight was fitted.

What is stored depends on the network, not on the dataset: at most 225 kB of model file metadata, mostly axes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ml.image.pixels.statistics import MEANINGS

SHARE = 0.02
"""Share of in-distribution scans that are rejected; each of the two distances rejects half of it."""
MIN_SCANS, MIN_GROUPS = 20, 10
"""Training scans (in each fit, also with a fold left out) and groups of them that a detector needs."""
MIN_UNSEEN_GROUPS = 5
"""Groups of validation scans that it takes to influence the limit."""
FOLDS = 5
AXES = 32
"""Dimension of a descriptor's subspace at most; there is at most one axis per ten scans."""
FLOOR = 0.1
"""Share of the mean standard deviation that is added, in quadrature, to that of each element of a descriptor. Otherwise
elements that hardly vary in training, or the rounding of an engine, would dominate after standardization."""
NOTABLE = 3.0
"""Standard deviations from which on a single input statistic is given as the reason of a rejection."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """A normal distribution of vectors [width] with one variance per axis, and one for all other directions.

    Vectors are standardized by `mean` and `scale`, [width] each. Of standardized vectors, `variances` [axes] are those
    along `axes` [axes, width], and `rest` is the variance in every other direction.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def fit(cls, values: np.ndarray, axes: int, floor: np.ndarray | float) -> Distribution:
        """Fit to `values` [n, width].

        `floor`, a scalar or [width], is added to their standard deviations in quadrature, and its mean square to the
        variance in every direction, so that constant elements are harmless.
        """
        mean = values.mean(axis=0)
        scale = np.hypot(values.std(axis=0), floor)
        standardized = (values - mean) / scale
        directions, variances = _principal(standardized, axes)
        least = float(((floor / scale) ** 2).mean())
        beside = (standardized**2).sum() / (len(values) - 1) - variances.sum()
        rest = float(beside / (values.shape[1] - axes)) + least
        return cls(mean, scale, directions, variances + least, rest)

    def distances(self, values: np.ndarray) -> np.ndarray:
        """Mahalanobis distances of vectors [n, width], as root mean square over the directions: float64 [n]."""
        standardized = (values - self.mean) / self.scale
        along = standardized @ self.axes.T
        beside = np.maximum((standardized**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        squares = (along**2 / self.variances).sum(axis=1) + beside / self.rest
        return np.asarray(np.sqrt(squares / len(self.mean)), np.float64)


def _principal(values: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes [axes, width] of centred values [n, width], and the variances along them, [axes].

    Uses the smaller one of the two Gram matrices: for values [512, 2048] an SVD takes 20 times as long.
    """
    from scipy.linalg import eigh

    by_scan, freedom = values.shape[0] < values.shape[1], len(values) - 1
    product = (values @ values.T if by_scan else values.T @ values) / freedom
    last = len(product) - 1
    variances, vectors = eigh(product, subset_by_index=[last - axes + 1, last])
    variances = np.maximum(variances, 1e-12)
    directions = vectors.T @ values / np.sqrt(variances * freedom)[:, None] if by_scan else vectors.T
    return directions, variances


@dataclass(frozen=True, eq=False)
class LimitedDistribution:
    """A distribution with the largest distance of in-distribution vectors."""

    distribution: Distribution
    limit: float

    def quotients(self, values: np.ndarray) -> np.ndarray:
        """Distances of vectors [n, width], divided by the limit: float64 [n]."""
        return self.distribution.distances(values) / self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; arrays as base64."""
        of = self.distribution
        arrays = {name: _text(getattr(of, name)) for name in ("mean", "scale", "axes", "variances")}
        return {**arrays, "rest": of.rest, "limit": self.limit}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LimitedDistribution:
        """The inverse of `as_dict`."""
        mean, scale, variances = (_array(fields[name]) for name in ("mean", "scale", "variances"))
        axes = _array(fields["axes"]).reshape(len(variances), len(mean))
        return cls(Distribution(mean, scale, axes, variances, float(fields["rest"])), float(fields["limit"]))


@dataclass(frozen=True, eq=False)
class OodDetector:
    """The distributions of a network's feature descriptors and input statistics.

    `shifts`: by dtype, how far its rounding moves all descriptors, float32 [width], from the dtype in which they were
    fitted. The shift is nearly the same for every scan and can be as large as the differences between scans. Dtypes
    without a shift are left out.
    """

    descriptors: LimitedDistribution
    statistics: LimitedDistribution
    shifts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> OodDetector | None:
        """The detector in a model file's metadata; None if there is none, as in files of earlier versions."""
        if (fields := metadata.get("outliers")) is None:
            return None
        shifts = {dtype: _array(text) for dtype, text in fields["shifts"].items()}
        return cls(
            LimitedDistribution.from_dict(fields["descriptors"]),
            LimitedDistribution.from_dict(fields["statistics"]),
            shifts,
        )

    def for_dtype(self, dtype: str) -> OodDetector:
        """The same detector for descriptors that an engine computes in this dtype."""
        shifted = self.descriptors.distribution.mean + self.shifts.get(dtype, 0)
        distribution = replace(self.descriptors.distribution, mean=shifted)
        return replace(self, descriptors=replace(self.descriptors, distribution=distribution))

    def as_dict(self) -> dict[str, Any]:
        """For a model file's metadata, under the key `outliers`."""
        shifts = {dtype: _text(shift) for dtype, shift in self.shifts.items()}
        return {"descriptors": self.descriptors.as_dict(), "statistics": self.statistics.as_dict(), "shifts": shifts}

    def scores(self, descriptors: np.ndarray, statistics: Sequence[Mapping[str, float]]) -> np.ndarray:
        """OOD scores, float64 [n], of descriptors [n, width] and input statistics; above 1: out of distribution."""
        pairs = self.descriptors.quotients(descriptors), self.statistics.quotients(statistics_table(statistics))
        return np.maximum(*pairs)

    def ood_reason(self, statistics: Mapping[str, float]) -> str | None:
        """The input statistic that stands out, in words; None if no single one does."""
        values, distribution = statistics_table([statistics]), self.statistics.distribution
        if self.statistics.quotients(values)[0] <= 1:
            return None
        deviations = ((values - distribution.mean) / distribution.scale)[0]
        index = int(np.abs(deviations).argmax())
        if abs(deviations[index]) < NOTABLE:
            return None
        meaning = list(MEANINGS.values())[index]
        return meaning.more if deviations[index] > 0 else meaning.less


def statistics_table(statistics: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Input statistics as float64 [n, 6], in the order of `MEANINGS`."""
    return np.array([[one[name] for name in MEANINGS] for one in statistics])


@dataclass(frozen=True, eq=False)
class UnseenDescriptors:
    """Descriptors [n, width] of scans that no weight was fitted to, and the group numbers of these scans, int [n]."""

    descriptors: np.ndarray
    groups: np.ndarray


def fit_detector(
    descriptors: np.ndarray,
    statistics: Sequence[Mapping[str, float]],
    groups: np.ndarray,
    unseen: UnseenDescriptors | None = None,
) -> OodDetector | None:
    """Fit a detector to training scans; None if there are too few scans or groups.

    Args:
        descriptors: feature descriptors [n, width].
        statistics: input statistics of the same scans.
        groups: int [n], equal for scans of one patient or of one picture.
        unseen: validation scans, if there are any.
    """
    smallest = len(groups) - int(np.bincount(_folds(groups), minlength=FOLDS).max())
    if smallest < MIN_SCANS or len(np.unique(groups)) < MIN_GROUPS:
        return None
    axes = min(AXES, smallest // 10)
    floor = FLOOR * float(np.sqrt(descriptors.var(axis=0).mean())) + 1e-12
    tolerances = np.array([meaning.tolerance for meaning in MEANINGS.values()])
    features = _fit_limited(
        descriptors.astype(np.float64), groups, lambda values: Distribution.fit(values, axes, floor)
    )
    if unseen is not None and (independent := len(np.unique(unseen.groups))) >= MIN_UNSEEN_GROUPS:
        distances = features.distribution.distances(unseen.descriptors.astype(np.float64))
        features = replace(features, limit=max(features.limit, _limit(distances, independent)))
    inputs = _fit_limited(
        statistics_table(statistics), groups, lambda values: Distribution.fit(values, len(MEANINGS) - 1, tolerances)
    )
    return OodDetector(features, inputs)


def _fit_limited(
    values: np.ndarray, groups: np.ndarray, fit: Callable[[np.ndarray], Distribution]
) -> LimitedDistribution:
    fold = _folds(groups)
    left_out = np.empty(len(values))
    for number in range(FOLDS):
        rows = fold == number
        left_out[rows] = fit(values[~rows]).distances(values[rows])
    return LimitedDistribution(fit(values), _limit(left_out, len(np.unique(groups))))


def _folds(groups: np.ndarray) -> np.ndarray:
    """The cross-validation fold of each scan, int64 [n]; a group is in one fold."""
    return np.unique(groups, return_inverse=True)[1] % FOLDS


def _limit(distances: np.ndarray, independent: int) -> float:
    """The distance that an in-distribution scan exceeds with probability `SHARE` / 2.

    The larger one of two estimates: the prediction bound of a log-normal distribution, which grows for few scans, and
    the empirical quantile, which accounts for heavy tails. `independent`: the number of groups.
    """
    from scipy.stats import t

    logs, beyond = np.log(distances + 1e-12), SHARE / 2
    far = t.ppf(1 - beyond, independent - 1) * np.sqrt(1 + 1 / independent)
    return float(max(np.exp(logs.mean() + far * logs.std(ddof=1)), np.quantile(distances, 1 - beyond)))


def _text(values: np.ndarray) -> str:
    """Base64; float16 is enough for axes, whose elements are below 1, everything else is float32."""
    kind = np.float16 if values.ndim == 2 else np.float32
    return f"{np.dtype(kind).name}:{base64.b64encode(values.astype(kind).tobytes()).decode()}"


def _array(text: str) -> np.ndarray:
    kind, _, content = text.partition(":")
    return np.frombuffer(base64.b64decode(content), np.dtype(kind)).astype(np.float32)
