"""Figures by patient: the slices of each are pooled into one answer (ml.spec.pooling), and the answer is judged.

A patient is a group of scans that belong together, as the split has them: where nothing tells the patients, a study, or
a picture with its near-duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ml.evaluation.calibration import EVIDENCE, choose_threshold
from ml.evaluation.intervals import Decisions, figures, intervals
from ml.spec.operating_point import F1, OperateAt, Scored, choose
from ml.spec.pooling import MAX, NOISY_OR, TOP, TOP_K, Pooling, pooled

MIN_PATIENTS = 10
"""Validation patients that it takes to choose a pooling; each class needs `MIN_OF_A_CLASS` of them."""
MIN_OF_A_CLASS = 3
CANDIDATES = (
    Pooling(TOP, TOP_K),
    Pooling(TOP, 5),
    Pooling(TOP, 10),
    Pooling(MAX, 1),
    Pooling(NOISY_OR),
)
"""The first is taken unless another one is better beyond doubt."""
_LEAST = 1e-6  # a pooled probability of 0 or 1 is no certainty: it would cost an infinite loss


def patient_labels(labels: np.ndarray, groups: np.ndarray, positive: Sequence[int]) -> np.ndarray:
    """The class of each patient, int [patients], in the order of `np.unique(groups)`; labels int [N] of the slices.

    A patient with any positive slice is positive, of the positive class with the most slices: a tumour is seen in some
    slices only. Others, and all where no class is positive, have the class of most of their slices.
    """
    return np.array([_label(labels[groups == group], positive) for group in np.unique(groups)], np.int64)


def _label(labels: np.ndarray, positive: Sequence[int]) -> int:
    found = labels[np.isin(labels, positive)]
    return int(np.bincount(found if len(found) else labels).argmax())


def choose_pooling(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    positive: Sequence[int],
    operate_at: OperateAt = F1,
    slice_threshold: float = 0.5,
    chosen_on: str = "validation",
) -> Pooling:
    """The pooling and threshold for validation patients: labels int [M], calibrated probabilities [M, classes].

    The pooling with the least mean log loss of the patients' answers, if it beats the mean of the top three by more
    than two standard errors of the difference, paired by patient: of five poolings one is always a little better on few
    patients by chance. The log loss, because the answer's limits of doubt are limits of a probability. The threshold as
    for slices, by the rule `operate_at`; where the patients are too few to choose by, it is that of the slices.
    `chosen_on`: see `ml.evaluation.operating.Choosing`.
    """
    default, kind = CANDIDATES[0], chosen_on.replace("_", "-")
    truth = np.isin(patient_labels(labels, groups, positive), positive)
    counts = np.bincount(truth.astype(int), minlength=2)
    if not len(positive) or len(truth) < MIN_PATIENTS or counts.min() < MIN_OF_A_CLASS:
        needed = f"{MIN_PATIENTS} with {MIN_OF_A_CLASS} of each class are needed to choose another"
        reason = f"{_named(default)}: {len(truth)} {kind} patients, and {needed}."
        return replace(default, threshold=slice_threshold, best_f1=slice_threshold, reason=reason)
    slices = [probabilities[groups == group][:, positive].sum(axis=1) for group in np.unique(groups)]
    scores = [np.array([each.pool(some.tolist()) for some in slices]) for each in CANDIDATES]
    losses = np.stack([_losses(truth, score) for score in scores])
    best = int(losses.mean(axis=1).argmin())
    gains = losses[0] - losses[best]
    chosen = best if gains.mean() > EVIDENCE * gains.std(ddof=1) / np.sqrt(len(truth)) else 0
    best_f1, why = choose_threshold(truth, scores[chosen])
    told = why.replace("validation scans", f"{kind} patients")
    reason = f"{_named(CANDIDATES[chosen])}, chosen on {len(truth)} {kind} patients."
    pooling = replace(CANDIDATES[chosen], threshold=best_f1, best_f1=best_f1, chosen=True, reason=f"{reason} {told}")
    if operate_at == F1:
        return pooling
    rule, wanted = next(iter(dict(operate_at).items()))
    threshold = choose(rule, wanted, Scored(truth.tolist(), scores[chosen].tolist(), range(len(truth))))
    return replace(pooling, threshold=threshold, reason=reason)


def _named(pooling: Pooling) -> str:
    top = f"The mean of the {pooling.k} slices with the highest probability"
    return {MAX: "The highest probability of a slice", NOISY_OR: "Noisy-or of the slices"}.get(pooling.method, top)


def _losses(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    right = np.where(truth, score, 1 - score)
    return -np.log(np.clip(right, _LEAST, 1 - _LEAST))


@dataclass(frozen=True)
class Patients:
    """The patients' answers, one case each: as decisions between all classes, and between the positive ones and the
    others (the same decisions where no class is positive)."""

    decisions: Decisions
    of_finding: Decisions


def judged(
    classes: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    positive: Sequence[str],
    pooling: Pooling,
    pooled_for: Sequence[str] | None = None,
) -> Patients:
    """The answers of the patients, in the order of `np.unique(groups)`.

    Args:
        labels: int [N], of the slices.
        probabilities: calibrated, [N, classes].
        groups: int [N], equal for slices of one patient.
        positive: the classes that figures are of.
        pooled_for: those that the pooling's threshold is for, where they are other ones.
    """
    names, indices = list(classes), [list(classes).index(name) for name in positive]
    deciding = positive if pooled_for is None else pooled_for
    truth = patient_labels(labels, groups, indices)
    answers = [_answer(classes, probabilities[groups == group], deciding, pooling) for group in np.unique(groups)]
    predicted = np.array([names.index(answer.label) for answer in answers], np.int64)
    pooled_ = np.array([[answer.probabilities[name] for name in names] for answer in answers])
    cases = np.arange(len(truth))
    every = Decisions(truth, predicted, _log_odds(pooled_), cases, None)
    if not indices:
        return Patients(every, every)
    odds = _log_odds(pooled_[:, indices].sum(axis=1))
    is_true, is_called = (np.isin(each, indices).astype(np.int64) for each in (truth, predicted))
    return Patients(every, Decisions(is_true, is_called, np.stack([-odds, odds], axis=1), cases, 1))


def by_patient(
    classes: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    positive: Sequence[str],
    pooling: Pooling,
    seed: int,
    pooled_for: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Figures of the patients' answers, as studies are answered when the model serves: plain JSON.

    `patients`; `per_class`: patients of each; accuracy, precision, recall, f1, specificity, roc_auc and pr_auc, None
    where undefined; their `intervals`; `confusion_matrix[true][predicted]`; `pooling`. Arguments as those of `judged`.
    """
    found = judged(classes, labels, probabilities, groups, positive, pooling, pooled_for)
    truth, predicted = found.decisions.labels, found.decisions.predicted
    one = np.ones((1, len(truth)))
    known = {name: _number(values[0]) for name, values in figures(one, found.of_finding).items()}
    between = intervals(found.of_finding, seed)
    if found.of_finding is not found.decisions:
        between["accuracy"] = intervals(found.decisions, seed)["accuracy"]
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(matrix, (truth, predicted), 1)
    return {
        "patients": len(truth),
        "per_class": {name: int((truth == index).sum()) for index, name in enumerate(classes)},
        **known,
        "accuracy": float((truth == predicted).mean()),
        "intervals": {name: [each.low, each.high] if each else None for name, each in between.items()},
        "confusion_matrix": matrix.tolist(),
        "pooling": pooling.as_dict(),
    }


def _answer(classes: Sequence[str], rows: np.ndarray, positive: Sequence[str], pooling: Pooling) -> Any:
    return pooled([dict(zip(classes, row.tolist(), strict=True)) for row in rows], positive, pooling)


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, 1e-15, 1 - 1e-15)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
