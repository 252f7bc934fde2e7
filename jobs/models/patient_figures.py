"""Answers and figures by patient of a version at another operating point, from the scores that it keeps: the same
definitions as in `ml.evaluation.by_patient`, and a test holds them equal. Pure functions."""

from dataclasses import replace

from jobs.tables import Json
from ml.spec.operating_point import F1, OperateAt, Scored, choose, share, without_threshold
from ml.spec.pooling import Pooling

_Patients = list[tuple[bool, float]]  # whether a patient has a positive scan, and the pooled score


def pooling_at(operate_at: OperateAt, scores: Json, old: Pooling, slice_threshold: float) -> Pooling:
    """The pooling with the threshold that a rule chooses on the patients that chose the old one; where those were too
    few, it is that of the slices.

    Raises:
        NoChoice
    """
    if not old.chosen:
        return replace(old, threshold=slice_threshold)
    old = replace(old, reason=without_threshold(old.reason))
    if operate_at == F1:
        return replace(old, threshold=old.best_f1)
    rule, wanted = next(iter(dict(operate_at).items()))
    patients = _patients(scores, "validation", old)
    truth, pooled = [is_true for is_true, _ in patients], [score for _, score in patients]
    return replace(old, threshold=choose(rule, wanted, Scored(truth, pooled, range(len(truth)))))


def by_patient_at(scores: Json, pooling: Pooling, old: Json) -> Json:
    """The figures by patient that depend on the threshold, in place of those in `old`. Of more than two classes the
    kept scores do not tell which one a patient would be called, so accuracy and confusion are not known."""
    patients = _patients(scores, "test", pooling)
    rows = [(is_true, score >= pooling.threshold) for is_true, score in patients]
    found = {(is_true, called): rows.count((is_true, called)) for is_true in (True, False) for called in (True, False)}
    hits, missed, alarms = found[True, True], found[True, False], found[False, True]
    of_two = len(scores["classes"]) == 2
    shares = {
        "recall": share([(called, case) for case, (is_true, called) in enumerate(rows) if is_true]),
        "specificity": share([(not called, case) for case, (is_true, called) in enumerate(rows) if not is_true]),
        "precision": share([(is_true, case) for case, (is_true, called) in enumerate(rows) if called]),
        "accuracy": share([(is_true == called, case) for case, (is_true, called) in enumerate(rows) if of_two]),
    }
    between = {name: None if each.low is None else [each.low, each.high] for name, each in shares.items()}
    return {
        **old,
        **{name: each.value for name, each in shares.items()},
        "precision": shares["precision"].value or 0.0,
        "f1": 2 * hits / (2 * hits + missed + alarms) if hits + missed + alarms else None,
        "intervals": {**old["intervals"], **between, "f1": None},
        "confusion_matrix": _confusion(scores, found) if of_two else None,
        "pooling": pooling.as_dict(),
    }


def _patients(scores: Json, side: str, pooling: Pooling) -> _Patients:
    of_group: dict[int, list[tuple[bool, float]]] = {}
    rows = scores[side]
    for label, score, group in zip(rows["label"], rows["score"], rows["group"], strict=True):
        of_group.setdefault(group, []).append((scores["classes"][label] in scores["positive"], score))
    return [
        (any(is_true for is_true, _ in scans), pooling.pool([score for _, score in scans]))
        for scans in of_group.values()
    ]


def _confusion(scores: Json, found: dict[tuple[bool, bool], int]) -> list[list[int]]:
    sides = [name in scores["positive"] for name in scores["classes"]]
    return [[found[is_true, called] for called in sides] for is_true in sides]
