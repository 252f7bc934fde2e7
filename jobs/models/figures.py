"""Figures of a version at another threshold, from the scores that it keeps (see `ml.evaluation.operating`): the same
definitions as in `ml.evaluation.metrics`, and a test holds them equal. Pure functions."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from jobs.tables import Json
from ml.spec.operating_point import Share, share

CONFIDENCE = "confidence"
_Rows = list[tuple[bool, int]]  # (outcome, group)


def figures_at(scores: Json, threshold: float, old: Json) -> Json:
    """The figures that depend on the threshold, in place of those in the metrics `old`."""
    test, classes = scores["test"], scores["classes"]
    called = _called(test, threshold)
    positive = {index for index, name in enumerate(classes) if name in scores["positive"]}
    is_true, is_called = ([label in positive for label in labels] for labels in (test["label"], called))
    matrix = _confusion(test["label"], called, len(classes))
    each = {name: _of_class(matrix, index) for index, name in enumerate(classes)}
    right = [one == other for one, other in zip(test["label"], called, strict=True)]
    found = [true and call for true, call in zip(is_true, is_called, strict=True)]
    shares = {
        "accuracy": share([*zip(right, test["group"], strict=True)]),
        "precision": share(_among(is_called, found, test["group"])),
        "recall": share(_among(is_true, found, test["group"])),
        "specificity": share(_among(_not(is_true), _not(is_called), test["group"])),
    }
    hits, total = sum(found), sum(is_true) + sum(is_called)
    return {
        **{name: each_share.value or 0.0 for name, each_share in shares.items()},
        "specificity": shares["specificity"].value,
        "f1": 2 * hits / total if total else 0.0,
        "confusion_matrix": matrix,
        "per_class": {
            name: {**(old.get("per_class") or {}).get(name, {}), **figures} for name, figures in each.items()
        },
        "macro": {name: _mean([figures[name] for figures in each.values()]) for name in ("precision", "recall", "f1")},
        **_intervals(shares, old),
    }


def reference_at(scores: Json, threshold: float, old: Json) -> Json:
    """The drift reference `old` with the classes and confidences of this threshold, in the same bins."""
    test, classes = scores["test"], scores["classes"]
    called = Counter(_called(test, threshold))
    rows = zip(test["score"], test["found_p"], test["other_p"], strict=True)
    confidences = [found if score >= threshold else other for score, found, other in rows]
    statistics = dict(old.get("statistics", {}))
    if CONFIDENCE in statistics:
        edges = statistics[CONFIDENCE]["edges"]
        counts = Counter(bisect_right(edges, value) for value in confidences)
        statistics[CONFIDENCE] = {"edges": edges, "counts": [counts[number] for number in range(len(edges) + 1)]}
    return {**old, "statistics": statistics, "classes": {name: called[index] for index, name in enumerate(classes)}}


def _called(test: Json, threshold: float) -> list[int]:
    rows = zip(test["score"], test["found"], test["other"], strict=True)
    return [found if score >= threshold else other for score, found, other in rows]


def _confusion(labels: Sequence[int], called: Sequence[int], classes: int) -> list[list[int]]:
    counts = Counter(zip(labels, called, strict=True))
    return [[counts[true, predicted] for predicted in range(classes)] for true in range(classes)]


def _of_class(matrix: list[list[int]], index: int) -> dict[str, float | None]:
    hits, true, called = matrix[index][index], sum(matrix[index]), sum(row[index] for row in matrix)
    if not true:
        return {"precision": None, "recall": None, "f1": None}
    return {"precision": hits / called if called else 0.0, "recall": hits / true, "f1": 2 * hits / (true + called)}


def _among(those: Sequence[bool], outcomes: Sequence[bool], groups: Sequence[int]) -> _Rows:
    return [(outcome, group) for that, outcome, group in zip(those, outcomes, groups, strict=True) if that]


def _not(values: Sequence[bool]) -> list[bool]:
    return [not value for value in values]


def _mean(values: Sequence[float | None]) -> float:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined)


def _intervals(shares: dict[str, Share], old: Json) -> Json:
    """Those of shares are known; that of F1 is not, and those of areas stay."""
    known = {name: None if each.low is None else [each.low, each.high] for name, each in shares.items()}
    methods = {name: "jackknife" for name, found in known.items() if found is not None}
    kept = {name: method for name, method in (old.get("interval_methods") or {}).items() if name.endswith("_auc")}
    return {
        "intervals": {**(old.get("intervals") or {}), **known, "f1": None},
        "interval_methods": {**kept, **methods},
    }
