"""The operating point of a trained network, chosen on scans that it was not fitted to; see ml.spec.operating_point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ml.evaluation.calibration import Calibration, calibrate, sides
from ml.evaluation.metrics import ModelOutputs
from ml.runtime.errors import BadParams
from ml.spec.operating_point import F1, NoChoice, OperateAt, OperatingPoint, Scored, operating_point, without_threshold

DIGITS = 9
"""Of a stored score: far below what two engines differ by."""


@dataclass(frozen=True, eq=False)
class Choosing:
    """The M scans that choose: `labels` and `groups`, int [M], and `logits`, [M, classes], of networks that did not
    learn from them. `chosen_on`: validation, or out_of_fold if a training has folds."""

    labels: np.ndarray
    logits: np.ndarray
    groups: np.ndarray
    chosen_on: str = "validation"


def calibrate_at(
    operate_at: OperateAt, chosen: Choosing, positive: Sequence[int]
) -> tuple[Calibration, OperatingPoint | None]:
    """Temperature and threshold by the scans that choose, and what the threshold gives on them.

    `positive`: indices of the positive classes; without any there is no operating point.

    Raises:
        BadParams: none of the scans is of the kind that `operate_at` counts.
    """
    found = calibrate(chosen.labels, chosen.logits, positive)
    calibration = replace(found, reason=_told(found.reason, operate_at, chosen.chosen_on))
    if calibration.threshold is None:
        return calibration, None
    with _naming_the_parameter():
        scored = scored_scans(chosen.labels, calibration.probabilities(chosen.logits), positive, chosen.groups)
        point = operating_point(operate_at, scored, calibration.threshold, chosen.chosen_on)
    return replace(calibration, threshold=point.threshold), point


def _told(reason: str, operate_at: OperateAt, chosen_on: str) -> str:
    """The reason of a calibration, without the threshold that F1 would choose where another rule does."""
    kept = reason if operate_at == F1 else without_threshold(reason)
    return kept.replace("validation scans", f"{chosen_on.replace('_', '-')} scans")


def require_choice(operate_at: OperateAt, labels: np.ndarray, positive: Sequence[int]) -> None:
    """Find out before a training whether `calibrate_at` will be able to choose on scans with these labels.

    Raises:
        BadParams
    """
    if not positive or operate_at == F1:
        return
    blank = [0.0] * len(labels)
    with _naming_the_parameter():
        operating_point(operate_at, Scored(np.isin(labels, positive).tolist(), blank, range(len(labels))), 0.5)


@contextmanager
def _naming_the_parameter() -> Iterator[None]:
    try:
        yield
    except NoChoice as error:
        raise BadParams(f"operate_at: {error}") from error


def scored_scans(labels: np.ndarray, probabilities: np.ndarray, positive: Sequence[int], groups: np.ndarray) -> Scored:
    """N scans by labels and groups, int [N], and calibrated probabilities [N, classes]."""
    scores = probabilities[:, list(positive)].sum(axis=1)
    return Scored(np.isin(labels, positive).tolist(), scores.round(DIGITS).tolist(), groups.tolist())


def kept_scores(outputs: ModelOutputs, calibration: Calibration, chosen: Choosing) -> dict[str, Any] | None:
    """What a version keeps so that its operating point can be set anew without a training: no names, no pictures. None
    without positive classes. `validation` are the scans that chose the point that it has.

    Of each scan label, group and score; of each test scan also the likeliest positive class and the likeliest other
    one, as indices, with their probabilities.
    """
    positive = outputs.findings
    if not positive:
        return None
    groups = np.arange(len(outputs.test_labels)) if outputs.groups is None else outputs.groups
    known, tested = (calibration.probabilities(each) for each in (chosen.logits, outputs.test_logits))
    likeliest = dict(zip(("found", "other"), sides(tested, positive), strict=True))
    extra = {name: index.tolist() for name, index in likeliest.items()}
    extra |= {f"{name}_p": _rounded(tested[np.arange(len(index)), index]) for name, index in likeliest.items()}
    return {
        "classes": list(outputs.classes),
        "positive": list(outputs.positive or ()),
        "validation": _columns(chosen.labels, known, positive, chosen.groups),
        "test": _columns(outputs.test_labels, tested, positive, groups) | extra,
    }


def _columns(
    labels: np.ndarray, probabilities: np.ndarray, positive: Sequence[int], groups: np.ndarray
) -> dict[str, list[Any]]:
    scored = scored_scans(labels, probabilities, positive, groups)
    return {"label": labels.tolist(), "score": list(scored.score), "group": list(scored.group)}


def _rounded(values: np.ndarray) -> list[float]:
    found: list[float] = values.round(DIGITS).tolist()
    return found
