"""One answer for the slices of a study or of a patient: their calibrated probabilities, pooled.

By the standard library alone, as the API answers by it and the evaluation measures it: what is served is what was
measured. The pooling itself is chosen in `ml.evaluation.by_patient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TOP_K = 3
"""Slices of which the mean is taken where nothing was chosen: a finding is seen in several neighbouring slices, and one
slice by itself is often a false alarm."""
MAX, TOP, NOISY_OR = "max", "top", "noisy_or"
Probabilities = Mapping[str, float]
"""Of one slice, by class."""


@dataclass(frozen=True)
class Pooling:
    """How the slices' probabilities of a positive finding become one.

    `method`: max; top, the mean of the `k` highest; noisy_or, the probability that any slice is positive if they were
    independent. From `threshold` on the answer is positive. `chosen`: on validation patients; else by default.
    `best_f1`: the threshold with the best F1 on them. `reason`: how, in a sentence.
    """

    method: str = TOP
    k: int = TOP_K
    threshold: float = 0.5
    chosen: bool = False
    best_f1: float = 0.5
    reason: str = f"The model names no pooling: the mean of the {TOP_K} slices with the highest probability."

    @classmethod
    def of(cls, metadata: Mapping[str, Any] | None) -> Pooling:
        """The pooling in a model's metadata or metrics, under `pooling`; the default if there is none."""
        return cls(**((metadata or {}).get("pooling") or {}))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; `of` reads it."""
        return asdict(self)

    def pool(self, scores: Sequence[float]) -> float:
        """One score, 0 to 1, of at least one slice's."""
        return min(1.0, max(0.0, _POOLED[self.method](sorted(scores, reverse=True), self.k)))

    def deciding(self, scores: Sequence[float]) -> list[int]:
        """The positions of the slices that decided, highest score first; of noisy_or the `k` that weigh most."""
        order = sorted(range(len(scores)), key=lambda position: -scores[position])
        return order[: 1 if self.method == MAX else self.k]


_POOLED: dict[str, Callable[[Sequence[float], int], float]] = {
    MAX: lambda highest, k: highest[0],
    TOP: lambda highest, k: math.fsum(highest[:k]) / len(highest[:k]),
    NOISY_OR: lambda highest, k: _any_of(highest),
}


def _any_of(scores: Sequence[float]) -> float:
    """1 − Π(1 − p), also where many small ones are multiplied."""
    if max(scores) >= 1:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-score) for score in scores))


@dataclass(frozen=True)
class Pooled:
    """The answer of several slices.

    `score`: of a positive finding; None where the model does not say which classes are findings. `deciding`: positions
    of the slices that decided it.
    """

    label: str
    probabilities: dict[str, float]
    score: float | None = None
    deciding: list[int] = field(default_factory=list)

    @property
    def confidence(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]


def pooled(slices: Sequence[Probabilities], positive: Sequence[str], pooling: Pooling) -> Pooled:
    """One answer for at least one slice.

    The score of a slice is the sum of its positive classes' probabilities. Without positive classes nothing says what
    a few slices may decide, so all of them count alike: the mean.
    """
    classes = list(slices[0])
    if not positive or not set(positive) < set(classes):
        means = {name: _mean([one[name] for one in slices]) for name in classes}
        label = max(classes, key=means.__getitem__)
        return Pooled(label, means, None, Pooling().deciding([one[label] for one in slices]))
    scores = [math.fsum(one[name] for name in positive) for one in slices]
    score = pooling.pool(scores)
    findings = _shared(score, {name: pooling.pool([one[name] for one in slices]) for name in positive})
    others = [name for name in classes if name not in positive]
    rest = _shared(1 - score, {name: _mean([one[name] for one in slices]) for name in others})
    label = max(side := findings if score >= pooling.threshold else rest, key=side.__getitem__)
    both = findings | rest
    return Pooled(label, {name: both[name] for name in classes}, score, pooling.deciding(scores))


def _shared(whole: float, weights: Mapping[str, float]) -> dict[str, float]:
    """The whole, divided by weight; evenly where no class has any."""
    total = math.fsum(weights.values())
    return {name: whole * (weight / total if total else 1 / len(weights)) for name, weight in weights.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
