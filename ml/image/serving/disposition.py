"""What may be done with a prediction: take the class, look again, or throw the scan out. In one word, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ml.evaluation.metrics import positive_class

REJECTED, INDETERMINATE = "rejected", "indeterminate"
_LARGEST = 99.0  # times the limit; beyond it only the size of the mistake grows
_ADVICE = "Check that it is an axial CT slice in the usual window."


@dataclass(frozen=True)
class Disposition:
    """`word`: a class's name in lower case, indeterminate or rejected. `reason`: why it is none of the classes."""

    word: str
    reason: str | None = None


def dispose(
    probabilities: Mapping[str, float],
    ood_score: float | None,
    low: float,
    high: float,
    oddity: str | None = None,
    label: str | None = None,
) -> Disposition:
    """What to do with a prediction.

    Two classes: the negative one where the positive one's probability is at most `low`, the positive one where it is at
    least `high`. More: the most probable one where its probability is at least `high`. `oddity`: what sets the scan
    apart, in words (`Prediction.oddity`); it is only told where the scan is rejected. `label`: what the network calls
    it. Its own threshold may lie beyond `low` or `high`; then the two disagree, and a person has to look.
    """
    if ood_score is not None and ood_score > 1:
        return Disposition(REJECTED, _unlike(ood_score, oddity))
    positive = positive_class(tuple(probabilities))
    found = _of_many(probabilities, high) if positive is None else _of_two(probabilities, positive, low, high)
    if label is None or found.word in (INDETERMINATE, label.lower()):
        return found
    said = probabilities[label]
    return Disposition(
        INDETERMINATE, f"The network is unsure: it calls this {label} by its own threshold, but with {said:.2f} only."
    )


def _unlike(ood_score: float, oddity: str | None) -> str:
    because = f": {oddity}" if oddity else ""
    return f"The scan is unlike those that the network has learnt from ({_times(ood_score)}){because}. {_ADVICE}"


def _times(ood_score: float) -> str:
    if ood_score > _LARGEST:
        return f"more than {_LARGEST:.0f} times the limit"
    return f"{ood_score:.1f} times the limit" if ood_score >= 1.05 else "just above the limit"


def _of_two(probabilities: Mapping[str, float], positive: str, low: float, high: float) -> Disposition:
    value = probabilities[positive]
    if value <= low:
        return Disposition(next(name for name in probabilities if name != positive).lower())
    if value >= high:
        return Disposition(positive.lower())
    said = _said(value, low, high)
    return Disposition(
        INDETERMINATE, f"The network is unsure: {positive} {said} lies between {low:.2f} and {high:.2f}."
    )


def _of_many(probabilities: Mapping[str, float], high: float) -> Disposition:
    name = max(probabilities, key=lambda one: probabilities[one])
    value = probabilities[name]
    if value >= high:
        return Disposition(name.lower())
    said = _said(value, high)
    return Disposition(
        INDETERMINATE, f"The network is unsure: {name}, the likeliest, has {said}, less than {high:.2f}."
    )


def _said(value: float, *limits: float) -> str:
    """Two digits, or more where these would be those of a limit that it has not reached."""
    for digits in (2, 3, 4):
        said = f"{value:.{digits}f}"
        if float(said) not in limits:
            return said
    return repr(value)
