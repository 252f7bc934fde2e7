"""Scores and their intervals: against hand-counted values and scikit-learn."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.evaluation.intervals import Decisions, resamples, wilson
from ml.evaluation.metrics import ModelOutputs, log_odds, score, sensitivity_at, worst_mistakes
from ml.runtime.errors import BadParams

CLASSES = ("Cyst", "Normal", "Stone", "Tumor")
INTERVALS = {"accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc"}


def logits_for(predicted: list[int], classes: int = 2) -> np.ndarray:
    """Logits of confident predictions."""
    return np.eye(classes, dtype=np.float32)[predicted] * 4


def make_outputs(
    scans: int = 93, validation: int = 0, classes: int = 2, seed: int = 0, signal: float = 1.5, per_group: int = 0
) -> ModelOutputs:
    """Outputs that are mostly correct, optionally in groups of `per_group` scans."""
    random = np.random.default_rng(seed)

    def side(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        logits = random.normal(size=(count, classes)).astype(np.float32)
        logits[np.arange(count), labels] += signal
        return labels, logits

    names = ("Normal", "Tumor") if classes == 2 else CLASSES[:classes]
    groups = np.arange(scans) // per_group if per_group else None
    return ModelOutputs(names, *side(scans), *side(validation), groups, seed)


def make_decisions(right: int, wrong: int, per_group: int = 1) -> Decisions:
    """Decisions with this many correct and wrong scans of each of two classes."""
    labels = np.arange(2 * (right + wrong)) % 2
    predicted = np.where(np.arange(len(labels)) < 2 * right, labels, 1 - labels)
    margins = np.stack([1 - 2.0 * predicted, 2.0 * predicted - 1], axis=1)
    return Decisions(labels, predicted, margins, np.arange(len(labels)) // per_group, 1)


# --- figures ---


def test_two_classes_are_scored_by_the_positive_one():
    scores = score(ModelOutputs(("Normal", "Tumor"), np.array([0, 0, 0, 1, 1]), logits_for([0, 0, 1, 1, 0])))
    assert scores.accuracy == pytest.approx(3 / 5)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert scores.specificity == pytest.approx(2 / 3)
    assert scores.confusion_matrix == [[2, 1], [1, 1]]
    normal = {name: scores.per_class["Normal"][name] for name in ("precision", "recall", "f1", "support")}
    assert normal == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores.roc_auc == pytest.approx((2 * 1 + 1 * 0.5 + 2 * 0.5 + 1 * 0) / 6)
    assert scores.held_out == 5


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_scikit_learn(classes, seed):
    outputs = make_outputs(120, classes=classes, seed=seed)
    scores, labels, logits = score(outputs), outputs.test_labels, outputs.test_logits
    average, chosen = ("binary", 1) if classes == 2 else ("macro", None)
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, logits.argmax(1), average=average, pos_label=chosen
    )
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx(expected[:3])
    one_hot, ranking = np.eye(classes)[labels], log_odds(logits)
    areas = [
        (sklearn.metrics.roc_auc_score(*pair), sklearn.metrics.average_precision_score(*pair))
        for pair in zip(one_hot.T, ranking.T, strict=True)
    ]
    found = [(scores.per_class[name]["roc_auc"], scores.per_class[name]["pr_auc"]) for name in outputs.classes]
    assert np.array(found) == pytest.approx(np.array(areas))
    headline = areas[1] if classes == 2 else np.mean(areas, axis=0)
    assert (scores.roc_auc, scores.pr_auc) == pytest.approx(tuple(headline))
    assert scores.confusion_matrix == sklearn.metrics.confusion_matrix(labels, logits.argmax(1)).tolist()


def test_the_areas_count_ties_as_scikit_learn_does():
    random = np.random.default_rng(0)
    labels, rank = random.integers(2, size=200), random.integers(6, size=200).astype(np.float32)
    scores = score(ModelOutputs(("0", "1"), labels, np.stack([np.zeros(200, np.float32), rank], axis=1)))
    assert scores.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, rank))
    assert scores.pr_auc == pytest.approx(sklearn.metrics.average_precision_score(labels, rank))


def test_scans_whose_probabilities_round_to_one_are_still_ranked():
    logits = np.array([[0, 100], [0, 90], [0, 80], [0, 70]], np.float32)
    assert score(ModelOutputs(("0", "1"), np.array([1, 1, 0, 0]), logits)).roc_auc == 1.0


def test_a_class_that_is_never_predicted_scores_zero():
    assert score(ModelOutputs(("0", "1"), np.array([0, 1]), logits_for([0, 0]))).f1 == 0


def test_what_is_not_defined_is_null_and_json_takes_it():
    scores = score(ModelOutputs(("0", "1"), np.zeros(4, np.int64), logits_for([0, 0, 1, 0])))
    told = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert told["roc_auc"] is None
    assert told["per_class"]["1"]["recall"] is None
    assert told["intervals"]["pr_auc"] is None
    assert told["sensitivity_at_specificity"] == {"0.90": None, "0.95": None}


def test_a_class_without_test_scans_does_not_count_in_the_macro_mean():
    scores = score(ModelOutputs(("a", "b", "c"), np.array([0, 1, 1]), logits_for([0, 1, 0], 3)))
    assert scores.recall == pytest.approx((1 + 0.5) / 2)


def test_outputs_that_are_not_finite_are_refused_by_the_field_that_causes_them():
    with pytest.raises(BadParams, match="learning_rate"):
        ModelOutputs(("0", "1"), np.array([0]), np.array([[np.nan, 1.0]], np.float32))


@pytest.mark.parametrize(
    ("labels", "logits", "groups"),
    [([], np.empty((0, 2)), None), ([0], np.zeros((1, 3)), None), ([0], np.zeros((1, 2)), np.zeros(2, np.int64))],
)
def test_arrays_that_do_not_fit_together_are_refused(labels, logits, groups):
    with pytest.raises(ValueError, match=r"scans|logits"):
        ModelOutputs(("0", "1"), np.array(labels, np.int64), logits, groups=groups)


def test_the_loss_is_the_cross_entropy():
    scores = score(ModelOutputs(("0", "1"), np.array([1]), np.array([[0.0, 1.0]], np.float32)))
    assert scores.loss == pytest.approx(np.log(1 + np.exp(-1)))
    assert np.isfinite(score(ModelOutputs(("0", "1"), np.array([0]), np.array([[-1e4, 1e4]], np.float32))).loss)


def test_the_sensitivity_at_a_specificity_is_that_of_a_threshold_that_exists():
    truth = np.array([False] * 20 + [True] * 4)
    ranking = np.array([*range(20), 17.5, 18.5, 19.5, 3])
    assert sensitivity_at(truth, ranking, 0.95) == pytest.approx(2 / 4)  # one of 20 may be wrong: above 18
    assert sensitivity_at(truth, ranking, 0.90) == pytest.approx(3 / 4)
    assert sensitivity_at(truth, ranking, 1.0) == pytest.approx(1 / 4)


def test_negatives_too_few_for_a_specificity_may_not_be_wrong_at_all():
    assert sensitivity_at(np.array([False] * 5 + [True] * 2), np.array([0, 1, 2, 3, 4, 5, 3.5]), 0.9) == 0.5


def test_the_threshold_moves_the_decisions_and_the_temperature_the_probabilities():
    random = np.random.default_rng(0)
    labels = np.arange(400) % 2
    logits = np.stack([np.zeros(400), 6 * random.normal(2.0 * labels - 1) - 6], axis=1).astype(np.float32)
    scores = score(ModelOutputs(("Normal", "Tumor"), labels, logits, labels, logits))
    plain = score(ModelOutputs(("Normal", "Tumor"), labels, logits))
    assert scores.temperature > 1.5
    assert scores.threshold is not None
    assert scores.threshold < 0.5
    assert scores.f1 > plain.f1 + 0.05
    assert scores.loss_calibrated < scores.loss == plain.loss
    assert scores.roc_auc == pytest.approx(plain.roc_auc)
    assert scores.ece_before == plain.ece


def test_the_context_is_added_and_nothing_else_changes():
    scores = score(make_outputs())
    leaks = {"patients": 0, "duplicates": 1, "near_duplicates": 2}
    told = scores.with_context({"train": 3, "validation": 2, "test": 93}, True, leaks).as_dict()
    assert (told["leaks"], told["patients_known"], told["cross_validation"]) == (leaks, True, None)
    assert {**told, "counts": None, "leaks": None, "patients_known": None} == scores.as_dict()


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(40)), st.sampled_from([2, 3]), st.sampled_from([0, 4]))
def test_the_order_of_the_scans_does_not_matter(order, classes, per_group):
    outputs = make_outputs(40, 30, classes, per_group=per_group)
    groups = None if outputs.groups is None else outputs.groups[order]
    turned = ModelOutputs(
        outputs.classes,
        outputs.test_labels[order],
        outputs.test_logits[order],
        outputs.validation_labels,
        outputs.validation_logits,
        groups,
    )
    assert _flat(score(turned).as_dict()) == pytest.approx(_flat(score(outputs).as_dict()))


def _flat(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {key: one for part, held in value.items() for key, one in _flat(held, f"{name}.{part}").items()}
    if isinstance(value, list):
        return _flat(dict(enumerate(value)), name)
    return {name: value}


# --- mistakes ---


def test_the_worst_mistakes_are_the_surest_ones():
    logits = np.array([[0, 1], [3, 0], [0, 5], [9, 0]], np.float32)
    found = worst_mistakes(ModelOutputs(("Normal", "Tumor"), np.array([0, 1, 0, 0]), logits), most=2)
    assert [(one.index, one.true, one.predicted) for one in found] == [(2, "Normal", "Tumor"), (1, "Tumor", "Normal")]
    assert found[0].confidence == pytest.approx(1 / (1 + np.exp(-5)))


# --- intervals ---


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 60), st.sampled_from([2, 3]), st.integers(0, 99), st.sampled_from([0, 5]), st.sampled_from([0, 9])
)
def test_an_interval_holds_its_figure_and_lies_between_0_and_1(scans, classes, seed, per_group, signal):
    scores = score(make_outputs(scans, 0, classes, seed, signal, per_group))
    assert set(scores.intervals) - {"specificity"} == INTERVALS
    for name, found in scores.intervals.items():
        if found is not None:
            assert 0 <= found[0] <= getattr(scores, name) <= found[1] <= 1, name


def test_wilsons_interval_is_the_textbooks():
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0


def test_a_resample_takes_whole_groups_and_as_many_of_each_class():
    made = Decisions(np.arange(12) // 6, np.zeros(12, np.int64), np.zeros((12, 2)), np.arange(12) // 3, 1)
    weights = np.concatenate(list(resamples(made, 0)))
    assert weights.shape == (2000, 12)
    assert (weights.reshape(-1, 4, 3) == weights.reshape(-1, 4, 3)[:, :, :1]).all()
    assert (weights[:, :6].sum(axis=1) == 6).all()
    assert (weights[:, 6:].sum(axis=1) == 6).all()


def test_the_seed_decides_nothing_where_each_group_is_left_out_once():
    first, other = score(make_outputs(seed=0)), score(_with_seed(make_outputs(), 7))
    for name, bounds in first.intervals.items():
        assert bounds == pytest.approx(other.intervals[name]), name


def _with_seed(outputs: ModelOutputs, seed: int) -> ModelOutputs:
    return ModelOutputs(outputs.classes, outputs.test_labels, outputs.test_logits, seed=seed)


def test_two_thousand_scans_take_no_minutes():
    outputs = make_outputs(2000, 500)
    started = time.process_time()
    score(outputs)
    assert time.process_time() - started < 5  # about 0.3 s on a quiet core
