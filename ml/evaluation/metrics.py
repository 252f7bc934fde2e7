"""Scores on test scans: from logits to everything in scores.json. Definitions and sources: docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ml.evaluation.calibration import (
    Calibration,
    calibrate,
    chance_error,
    cross_entropy,
    reliability,
    softmax,
    top_label,
)
from ml.evaluation.intervals import Decisions, figures, intervals, per_class
from ml.runtime.errors import BadParams

_POSITIVE = ("tumor", "tumour")
SPECIFICITIES = (0.90, 0.95)


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """A network's answers: logits float [N, classes] and int labels [N] of test scans, the same of M validation scans.

    M may be 0. `groups`: int [N], equal for test scans of one patient or one picture; None: each scan is its own.
    `seed`: of the bootstrap. ValueError where shapes disagree; BadParams where a logit is not finite.
    """

    classes: tuple[str, ...]
    test_labels: np.ndarray
    test_logits: np.ndarray
    validation_labels: np.ndarray = field(default_factory=_none)
    validation_logits: np.ndarray = field(default_factory=_none)
    groups: np.ndarray | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for labels, logits in (
            (self.test_labels, self.test_logits),
            (self.validation_labels, self.validation_logits),
        ):
            if len(labels) and logits.shape != (len(labels), len(self.classes)):
                raise ValueError(f"logits of shape {logits.shape} for {len(labels)} scans, {len(self.classes)} classes")
            if not np.isfinite(logits).all():
                raise BadParams("learning_rate: the network's outputs are not finite numbers; choose a smaller one.")
        if not len(self.test_labels):
            raise ValueError("there are no test scans")
        if self.groups is not None and len(self.groups) != len(self.test_labels):
            raise ValueError(f"{len(self.groups)} groups for {len(self.test_labels)} test scans")

    @property
    def positive(self) -> int | None:
        """Index of the positive class, of two."""
        return positive_index(self.classes)


@dataclass(frozen=True)
class Scores:
    """Scores 0–1; losses are mean cross-entropies in nats. `confusion_matrix[true][predicted]` counts test scans.

    With two classes precision, recall (sensitivity), f1, specificity and the areas are those of `positive`, called so
    from `threshold` on; with more they are macro means, and `positive`, `threshold` and `specificity` None. A figure
    that is not defined is None (an AUC where the test scans are of one class), never NaN; precision, recall and f1 are
    then 0. `ece_chance`: the calibration error that a perfectly calibrated network would show here. `independent`:
    groups of test scans (patients, where known).
    `interval_methods`: bootstrap or wilson. From `counts` on: what `with_context` adds.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    specificity: float | None
    loss: float
    loss_calibrated: float
    per_class: dict[str, dict[str, float | None]]
    macro: dict[str, float]
    roc_auc: float | None
    pr_auc: float | None
    sensitivity_at_specificity: dict[str, float | None]
    threshold: float | None
    temperature: float
    calibration: str
    ece: float
    ece_before: float
    ece_chance: float
    intervals: dict[str, list[float] | None]
    interval_methods: dict[str, str]
    confusion_matrix: list[list[int]]
    classes: list[str]
    positive: str | None
    held_out: int
    independent: int
    counts: dict[str, int] | None = None
    patients_known: bool | None = None
    leaks: dict[str, int] | None = None
    cross_validation: dict[str, Any] | None = None

    def with_context(
        self,
        counts: Mapping[str, int],
        patients_known: bool,
        leaks: Mapping[str, int],
        cross_validation: Mapping[str, Any] | None = None,
    ) -> Scores:
        """The same scores with what the answers alone cannot tell.

        `counts`: scans in train, validation, test. `leaks`: test scans that share patients, duplicates, near_duplicates
        with what was learned from. `cross_validation`: folds (a list of figures), mean and std.
        """
        told = None if cross_validation is None else dict(cross_validation)
        return replace(
            self, counts=dict(counts), patients_known=patients_known, leaks=dict(leaks), cross_validation=told
        )

    def as_dict(self) -> dict[str, Any]:
        """For scores.json and the `evaluated` event: plain types, nothing that JSON refuses."""
        return asdict(self)


@dataclass(frozen=True)
class Mistake:
    """A test scan, by its place among the test scans, that was called another class than its own, and how surely."""

    index: int
    true: str
    predicted: str
    confidence: float


def positive_class(classes: tuple[str, ...]) -> str | None:
    """The class of a positive finding: Tumor where there is one, else the last of two; None for more than two."""
    if len(classes) != 2:
        return None
    return next((name for name in classes if name.lower() in _POSITIVE), classes[-1])


def positive_index(classes: tuple[str, ...]) -> int | None:
    """The place of `positive_class` among the network's outputs."""
    name = positive_class(classes)
    return None if name is None else classes.index(name)


def score(judged: ModelOutputs, calibration: Calibration | None = None) -> Scores:
    """All scores of the test scans; temperature and threshold are those of `calibration`, else chosen on the validation
    scans."""
    calibration = calibration or calibration_of(judged)
    made, labels = decide(judged, calibration), judged.test_labels
    found: dict[str, Any] = {
        **_headline(made),
        **_each_class(made, judged.classes),
        **_intervals(made, judged.seed),
        **_calibration_errors(judged, calibration),
    }
    return Scores(
        **found,
        loss=cross_entropy(labels, judged.test_logits),
        loss_calibrated=cross_entropy(labels, judged.test_logits, calibration.temperature),
        sensitivity_at_specificity={f"{wanted:.2f}": _sensitivity_at(made, wanted) for wanted in SPECIFICITIES},
        threshold=calibration.threshold,
        temperature=calibration.temperature,
        calibration=calibration.reason,
        confusion_matrix=_confusion(made),
        classes=list(judged.classes),
        positive=positive_class(judged.classes),
        held_out=len(labels),
        independent=len(np.unique(made.groups)),
    )


def calibration_of(judged: ModelOutputs) -> Calibration:
    """Temperature and threshold: what a prediction of this network has to use too."""
    return calibrate(judged.validation_labels, judged.validation_logits, judged.positive)


def decide(judged: ModelOutputs, calibration: Calibration) -> Decisions:
    """What the network said of the test scans."""
    groups = np.arange(len(judged.test_labels)) if judged.groups is None else judged.groups
    predicted = calibration.decide(judged.test_logits, judged.positive)
    margins = log_odds(judged.test_logits, calibration.temperature)
    return Decisions(judged.test_labels, predicted, margins, groups, judged.positive)


def log_odds(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """log(p / (1 − p)) of each class, float64 [N, classes].

    Ranking by it keeps scans apart whose probabilities round to the same 1.0.
    """
    scaled = logits.astype(np.float64) / temperature
    result = np.empty_like(scaled)
    for index in range(scaled.shape[1]):
        others = np.delete(scaled, index, axis=1)
        result[:, index] = scaled[:, index] - np.logaddexp.reduce(others, axis=1)
    return result


def sensitivity_at(truth: np.ndarray, ranking: np.ndarray, specificity: float) -> float | None:
    """The highest sensitivity of a threshold whose specificity on these scans is at least the wanted one.

    No interpolation: some threshold really does this. None without both kinds. `truth`: bool [N]; `ranking`: [N].
    """
    negatives = np.sort(ranking[~truth])
    if not len(negatives) or len(negatives) == len(ranking):
        return None
    may_be_wrong = int(np.floor((1 - specificity) * len(negatives) + 1e-9))
    above = negatives[len(negatives) - 1 - may_be_wrong]  # positive is what ranks above this negative
    return float((ranking[truth] > above).mean())


def worst_mistakes(judged: ModelOutputs, most: int = 12) -> list[Mistake]:
    """The test scans that were wrongly called with the highest probability of what they were called, worst first."""
    calibration = calibration_of(judged)
    predicted = calibration.decide(judged.test_logits, judged.positive)
    confidence = calibration.probabilities(judged.test_logits)[np.arange(len(predicted)), predicted]
    wrong = np.flatnonzero(predicted != judged.test_labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    names = judged.classes
    return [
        Mistake(int(index), names[judged.test_labels[index]], names[predicted[index]], float(confidence[index]))
        for index in worst
    ]


def _sensitivity_at(made: Decisions, specificity: float) -> float | None:
    chosen = range(made.classes) if made.positive is None else [made.positive]
    found = [sensitivity_at(made.labels == index, made.margins[:, index], specificity) for index in chosen]
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if defined else None


def _headline(made: Decisions) -> dict[str, float | None]:
    one = {name: _number(values[0]) for name, values in figures(_once(made), made).items()}
    always = {name: one[name] or 0.0 for name in ("accuracy", "precision", "recall", "f1")}
    return {**always, **{name: one.get(name) for name in ("specificity", "roc_auc", "pr_auc")}}


def _each_class(made: Decisions, classes: tuple[str, ...]) -> dict[str, Any]:
    each = {name: values[0] for name, values in per_class(_once(made), made, range(made.classes)).items()}
    support = np.bincount(made.labels, minlength=made.classes)
    return {
        "per_class": {
            name: {
                **{figure: _number(values[index]) for figure, values in each.items()},
                "support": int(support[index]),
            }
            for index, name in enumerate(classes)
        },
        "macro": {figure: float(np.nanmean(each[figure])) for figure in ("precision", "recall", "f1")},
    }


def _intervals(made: Decisions, seed: int) -> dict[str, Any]:
    known = intervals(made, seed)
    return {
        "intervals": {name: None if found is None else [found.low, found.high] for name, found in known.items()},
        "interval_methods": {name: found.method for name, found in known.items() if found is not None},
    }


def _once(made: Decisions) -> np.ndarray:
    return np.ones((1, len(made.labels)))


def _calibration_errors(judged: ModelOutputs, calibration: Calibration) -> dict[str, float]:
    before = top_label(judged.test_labels, softmax(judged.test_logits))
    right, confidence = top_label(judged.test_labels, calibration.probabilities(judged.test_logits))
    return {
        "ece": reliability(right, confidence).error,
        "ece_before": reliability(*before).error,
        "ece_chance": chance_error(confidence, judged.seed),
    }


def _confusion(made: Decisions) -> list[list[int]]:
    counts = np.zeros((made.classes, made.classes), np.int64)
    np.add.at(counts, (made.labels, made.predicted), 1)
    return [[int(count) for count in row] for row in counts]


def _number(value: float) -> float | None:
    """A float as it is; None for NaN, which JSON refuses."""
    return None if np.isnan(value) else float(value)
