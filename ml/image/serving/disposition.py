"""The disposition of a prediction: accept its class, have a person look at it (indeterminate), or reject the scan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ml.evaluation.positive import by_first_rule
from ml.image.pixels.picture import GREY, Origin, foreign, is_blank
from ml.image.pixels.statistics import in_colour
from ml.pipelines import INDETERMINATE, REJECTED, Disposition

UNSUITABLE = "unsuitable"
"""Key of a prediction's `output`: why the scan is blank or foreign."""
_MAX_SHOWN = 99.0  # times the limit; larger scores are not distinguished
_ADVICE = "Check that it is an axial CT slice in the usual window."


def unsuitable(pixels: np.ndarray, origin: Origin, learnt: Collection[Origin]) -> str | None:
    """Why no network should answer for this picture, uint8 [height, width, 3], or this one, which learnt from `learnt`.

    None if it may answer.
    """
    if is_blank(pixels):
        return "The scan is blank: it shows nothing but one grey level. Check that it was exported with its pixels."
    is_grey = origin.kind == GREY or not in_colour(pixels)
    why = foreign(replace(origin, kind=GREY) if is_grey else origin, learnt)
    return why and f"The scan is foreign to this network: {why}. Use a network that has learnt from such scans."


def disposition_of(
    probabilities: Mapping[str, float],
    ood_score: float | None,
    low: float,
    high: float,
    ood_reason: str | None = None,
    label: str | None = None,
    positive: Sequence[str] | None = None,
) -> Disposition:
    """The disposition of a prediction under the limits `low` and `high`, probabilities 0 to 1.

    With two classes: the negative class if the probability of the positive one is at most `low`, the positive class if
    it is at least `high`. With more: the most probable class if its probability is at least `high`, and if the classes
    `positive` together have at most `low` or at least `high`. `positive`: those of the model; None: of an older model,
    whose classes tell (see `ml.evaluation.positive`). An `ood_score` above 1 rejects the scan, and `ood_reason` (see
    `Prediction`) explains why. `label`: the network's own decision. Its threshold may lie outside of `low` and `high`;
    if the two disagree, the result is indeterminate.
    """
    if ood_score is not None and ood_score > 1:
        return Disposition(REJECTED, _rejection(ood_score, ood_reason))
    findings = by_first_rule(tuple(probabilities)) if positive is None else tuple(positive)
    found = _of_classes(probabilities, findings, low, high)
    if label is None or found.word in (INDETERMINATE, label.lower()):
        return found
    shown = probabilities[label]
    return Disposition(
        INDETERMINATE, f"The network is unsure: it calls this {label} by its own threshold, but with {shown:.2f} only."
    )


def of_file(found: Disposition, output: Mapping[str, Any] | None) -> Disposition:
    """The disposition that the file allows, whatever the network found, by what the result says of it
    (`Prediction.output`).

    A blank or foreign scan is rejected (`unsuitable`). One slice says little of the others, so where one of several
    frames was looked at, a class becomes indeterminate.
    """
    told = output or {}
    if UNSUITABLE in told:
        return Disposition(REJECTED, told[UNSUITABLE])
    frame, frames = (told.get(name, 1) for name in ("frame", "frames"))
    if frames == 1 or found.word == REJECTED:
        return found
    advice = "send each slice as a file of its own"
    return Disposition(INDETERMINATE, f"Only frame {frame} of {frames} was looked at: {advice}.")


def _rejection(ood_score: float, ood_reason: str | None) -> str:
    because = f": {ood_reason}" if ood_reason else ""
    return f"The scan is unlike those that the network has learnt from ({_times(ood_score)}){because}. {_ADVICE}"


def _times(ood_score: float) -> str:
    if ood_score > _MAX_SHOWN:
        return f"more than {_MAX_SHOWN:.0f} times the limit"
    return f"{ood_score:.1f} times the limit" if ood_score >= 1.05 else "just above the limit"


def _of_classes(probabilities: Mapping[str, float], positive: Sequence[str], low: float, high: float) -> Disposition:
    value = sum(probabilities[name] for name in positive)
    if positive and low < value < high:
        shown, names = _rounded(value, low, high), " or ".join(positive)
        unsure = f"The network is unsure: {names} {shown} lies between {low:.2f} and {high:.2f}."
        return Disposition(INDETERMINATE, unsure)
    if len(probabilities) > 2 or not positive:
        return _of_many(probabilities, high)
    is_found = value >= high
    return Disposition(next(name for name in probabilities if (name in positive) == is_found).lower())


def _of_many(probabilities: Mapping[str, float], high: float) -> Disposition:
    name = max(probabilities, key=lambda one: probabilities[one])
    value = probabilities[name]
    if value >= high:
        return Disposition(name.lower())
    shown = _rounded(value, high)
    return Disposition(
        INDETERMINATE, f"The network is unsure: {name}, the likeliest, has {shown}, less than {high:.2f}."
    )


def _rounded(value: float, *limits: float) -> str:
    """With two digits, or more if it would round to one of the limits."""
    for digits in (2, 3, 4):
        shown = f"{value:.{digits}f}"
        if float(shown) not in limits:
            return shown
    return repr(value)
