"""Scores on test scans, from logits to everything in scores.json. Definitions and sources: docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ml.evaluation.intervals import Decisions, Interval, figures, groups_per_class, intervals, per_class
from ml.evaluation.positive import indices, resolve
from ml.evaluation.subgroups import Subgroup
from ml.runtime.errors import BadParams

SPECIFICITIES = (0.90, 0.95)


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """Logits float [N, classes] and labels int [N] of test scans, and the same of M validation scans.

    M may be 0. `groups`: int [N], equal for test scans of one patient or picture; None: each scan is its own group.
    `seed`: of the bootstrap. `positive`: the positive classes; None: those that the names tell. `calibration`: the
    model's own; None: it is chosen on the validation scans. ValueError if shapes do not match; BadParams if a logit is
    not finite, or if the names do not tell.
    """

    classes: tuple[str, ...]
    test_labels: np.ndarray
    test_logits: np.ndarray
    validation_labels: np.ndarray = field(default_factory=_none)
    validation_logits: np.ndarray = field(default_factory=_none)
    groups: np.ndarray | None = None
    seed: int = 0
    positive: tuple[str, ...] | None = None
    calibration: Calibration | None = None

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
        if self.positive is None:
            object.__setattr__(self, "positive", resolve(self.classes))
        if self.groups is not None and len(self.groups) != len(self.test_labels):
            raise ValueError(f"{len(self.groups)} groups for {len(self.test_labels)} test scans")

    @property
    def findings(self) -> list[int]:
        """Indices of the positive classes."""
        return indices(self.classes, self.positive or ())


@dataclass(frozen=True)
class Scores:
    """Scores, 0–1; losses are mean cross-entropies in nats. `confusion_matrix[true][predicted]` counts test scans.

    With classes `positive`, precision, recall (sensitivity), f1, specificity and the areas are those of a finding,
    which is predicted from `threshold` of the sum of their probabilities on. Without, they are macro means over the
    classes, and `threshold` and `specificity` are None. Undefined figures (an AUC with test scans of one class) are
    None, never NaN; precision, recall and f1 are then 0. `ece_chance`: calibration error of a perfectly calibrated
    network on these scans. `independent`: number of groups of test scans (patients, if known), `independent_per_class`
    those of each class. With too few of them `intervals` are None (see `ml.evaluation.intervals`). `with_context` sets
    the fields from `counts` on.
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
    positive: list[str]
    held_out: int
    independent: int
    independent_per_class: dict[str, int]
    counts: dict[str, int] | None = None
    patients_known: bool | None = None
    leaks: dict[str, int] | None = None
    cross_validation: dict[str, Any] | None = None
    subgroups: list[dict[str, Any]] = field(default_factory=list)

    def with_context(
        self,
        counts: Mapping[str, int],
        patients_known: bool,
        leaks: Mapping[str, int],
        cross_validation: Mapping[str, Any] | None = None,
        subgroups: Sequence[Subgroup] = (),
    ) -> Scores:
        """The same scores with information from outside of the outputs.

        `counts`: scans in train, validation and test. `leaks`: test scans that share patients, duplicates or
        near_duplicates with the training. `cross_validation`: see `ml.evaluation.out_of_fold.summary`. `subgroups`: of
        the test scans.
        """
        folds = None if cross_validation is None else dict(cross_validation)
        return replace(
            self,
            counts=dict(counts),
            patients_known=patients_known,
            leaks=dict(leaks),
            cross_validation=folds,
            subgroups=[one.as_dict() for one in subgroups],
        )

    def as_dict(self) -> dict[str, Any]:
        """For scores.json and the `evaluated` event: plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Mistake:
    """A misclassified test scan: its index among the test scans, and the probability of the predicted class."""

    index: int
    true: str
    predicted: str
    confidence: float


def score(
    outputs: ModelOutputs, calibration: Calibration | None = None, deciding: Sequence[int] | None = None
) -> Scores:
    """All scores of the test scans, under another `calibration` than that of the outputs, if it is given.

    `deciding`: indices of the classes that `calibration`'s threshold is for, where they are other ones than those that
    the figures are of.
    """
    calibration = calibration or calibration_of(outputs)
    decisions, labels = decide(outputs, calibration, deciding), outputs.test_labels
    of_finding = finding(decisions, outputs, calibration)
    computed: dict[str, Any] = {
        **_headline_figures(of_finding),
        "accuracy": float((decisions.predicted == labels).mean()),
        **_each_class(decisions, outputs.classes),
        **_intervals(decisions, of_finding, outputs.seed),
        **_calibration_errors(outputs, calibration),
    }
    return Scores(
        **computed,
        loss=cross_entropy(labels, outputs.test_logits),
        loss_calibrated=cross_entropy(labels, outputs.test_logits, calibration.temperature),
        sensitivity_at_specificity={f"{wanted:.2f}": _sensitivity_at(of_finding, wanted) for wanted in SPECIFICITIES},
        threshold=calibration.threshold,
        temperature=calibration.temperature,
        calibration=calibration.reason,
        confusion_matrix=_confusion(decisions),
        classes=list(outputs.classes),
        positive=list(outputs.positive or ()),
        held_out=len(labels),
        independent=len(np.unique(decisions.groups)),
        independent_per_class=dict(zip(outputs.classes, groups_per_class(decisions), strict=True)),
    )


def calibration_of(outputs: ModelOutputs) -> Calibration:
    """The outputs' temperature and threshold; predictions of this network must use them too."""
    return outputs.calibration or calibrate(outputs.validation_labels, outputs.validation_logits, outputs.findings)


def decide(outputs: ModelOutputs, calibration: Calibration, deciding: Sequence[int] | None = None) -> Decisions:
    """The network's decisions for the test scans. `deciding`: see `score`."""
    groups = np.arange(len(outputs.test_labels)) if outputs.groups is None else outputs.groups
    findings = outputs.findings
    predicted = calibration.decide(outputs.test_logits, findings if deciding is None else deciding)
    margins = log_odds(outputs.test_logits, calibration.temperature)
    of_two = findings[0] if len(outputs.classes) == 2 and findings else None
    return Decisions(outputs.test_labels, predicted, margins, groups, of_two)


def finding(decisions: Decisions, outputs: ModelOutputs, calibration: Calibration) -> Decisions:
    """The same decisions as between two classes, the negative and the positive ones; unchanged where there are but two,
    or no positive ones."""
    findings = outputs.findings
    if decisions.positive is not None or not findings:
        return decisions
    odds = log_odds(outputs.test_logits, calibration.temperature, findings)
    labels, predicted = (np.isin(each, findings).astype(np.int64) for each in (decisions.labels, decisions.predicted))
    return Decisions(labels, predicted, np.stack([-odds, odds], axis=1), decisions.groups, 1)


def log_odds(logits: np.ndarray, temperature: float = 1.0, together: Sequence[int] = ()) -> np.ndarray:
    """log(p / (1 − p)) of each class, float64 [N, classes], or of the classes `together`, float64 [N].

    A ranking by log-odds separates scans whose probabilities round to the same 1.0.
    """
    scaled = logits.astype(np.float64) / temperature
    if together:
        ours, others = scaled[:, list(together)], np.delete(scaled, list(together), axis=1)
        return np.asarray(np.logaddexp.reduce(ours, axis=1) - np.logaddexp.reduce(others, axis=1))
    result = np.empty_like(scaled)
    for index in range(scaled.shape[1]):
        others = np.delete(scaled, index, axis=1)
        result[:, index] = scaled[:, index] - np.logaddexp.reduce(others, axis=1)
    return result


def sensitivity_at(truth: np.ndarray, ranking: np.ndarray, specificity: float) -> float | None:
    """The highest sensitivity of any threshold whose specificity on these scans is at least `specificity`.

    There is no interpolation. None without both classes. `truth`: bool [N]; `ranking`: float [N].
    """
    negatives = np.sort(ranking[~truth])
    if not len(negatives) or len(negatives) == len(ranking):
        return None
    allowed = int(np.floor((1 - specificity) * len(negatives) + 1e-9))
    above = negatives[len(negatives) - 1 - allowed]  # scans that rank above this negative are positive
    return float((ranking[truth] > above).mean())


def worst_mistakes(outputs: ModelOutputs, calibration: Calibration | None = None, most: int = 12) -> list[Mistake]:
    """The test scans that were misclassified with the highest probability, worst first. `calibration`: see `score`."""
    calibration = calibration or calibration_of(outputs)
    predicted = calibration.decide(outputs.test_logits, outputs.findings)
    confidence = calibration.probabilities(outputs.test_logits)[np.arange(len(predicted)), predicted]
    wrong = np.flatnonzero(predicted != outputs.test_labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    names = outputs.classes
    return [
        Mistake(int(index), names[outputs.test_labels[index]], names[predicted[index]], float(confidence[index]))
        for index in worst
    ]


def _sensitivity_at(decisions: Decisions, specificity: float) -> float | None:
    chosen = range(decisions.classes) if decisions.positive is None else [decisions.positive]
    sensitivities = [
        sensitivity_at(decisions.labels == index, decisions.margins[:, index], specificity) for index in chosen
    ]
    defined = [value for value in sensitivities if value is not None]
    return float(np.mean(defined)) if defined else None


def _headline_figures(decisions: Decisions) -> dict[str, float | None]:
    one = {name: _number(values[0]) for name, values in figures(_ones(decisions), decisions).items()}
    always = {name: one[name] or 0.0 for name in ("accuracy", "precision", "recall", "f1")}
    return {**always, **{name: one.get(name) for name in ("specificity", "roc_auc", "pr_auc")}}


def _each_class(decisions: Decisions, classes: tuple[str, ...]) -> dict[str, Any]:
    each = {
        name: values[0] for name, values in per_class(_ones(decisions), decisions, range(decisions.classes)).items()
    }
    support = np.bincount(decisions.labels, minlength=decisions.classes)
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


def _intervals(decisions: Decisions, of_finding: Decisions, seed: int) -> dict[str, Any]:
    known: dict[str, Interval | None] = intervals(of_finding, seed)
    if of_finding is not decisions:
        known["accuracy"] = intervals(decisions, seed)["accuracy"]
    return {
        "intervals": {name: None if found is None else [found.low, found.high] for name, found in known.items()},
        "interval_methods": {name: found.method for name, found in known.items() if found is not None},
    }


def _ones(decisions: Decisions) -> np.ndarray:
    return np.ones((1, len(decisions.labels)))


def _calibration_errors(outputs: ModelOutputs, calibration: Calibration) -> dict[str, float]:
    before = top_label(outputs.test_labels, softmax(outputs.test_logits))
    correct, confidence = top_label(outputs.test_labels, calibration.probabilities(outputs.test_logits))
    return {
        "ece": reliability(correct, confidence).error,
        "ece_before": reliability(*before).error,
        "ece_chance": chance_error(confidence, outputs.seed),
    }


def _confusion(decisions: Decisions) -> list[list[int]]:
    counts = np.zeros((decisions.classes, decisions.classes), np.int64)
    np.add.at(counts, (decisions.labels, decisions.predicted), 1)
    return [[int(count) for count in row] for row in counts]


def _number(value: float) -> float | None:
    """A float; None for NaN, which is not valid JSON."""
    return None if np.isnan(value) else float(value)
