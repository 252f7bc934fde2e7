"""Operating points: the rules against brute force, and what a training, a model file and a report say of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ml.evaluation.calibration import Calibration
from ml.evaluation.intervals import Decisions, intervals
from ml.evaluation.metrics import ModelOutputs, score
from ml.evaluation.operating import Choosing, calibrate_at, kept_scores, require_choice
from ml.runtime.config import parse_params
from ml.runtime.errors import BadParams
from ml.spec import operating_point
from ml.spec.operating_point import EXPECTED, Scored, choose, parse, sentence, share, shares_at, student


def scored(seed: int, scans: int = 40, per_group: int = 1) -> Scored:
    random = np.random.default_rng(seed)
    truth = np.arange(scans) % 3 == 0
    score = np.clip(random.normal(0.35 + 0.3 * truth, 0.2), 0.001, 0.999).round(2)  # with ties
    return Scored(truth.tolist(), score.tolist(), (np.arange(scans) // per_group).tolist())


def at(threshold: float, scans: Scored) -> tuple[float, float]:
    """Sensitivity and specificity, counted."""
    truth, called = np.array(scans.truth), np.array(scans.score) >= threshold
    return float(called[truth].mean()), float((~called[~truth]).mean())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95, 1.0])
def test_of_all_thresholds_with_the_wanted_figure_the_best_other_one_is_chosen(seed, wanted):
    scans = scored(seed)
    tried = [at(threshold, scans) for threshold in np.arange(0.0005, 1, 0.001)]
    for rule, of_rule, other in (("sensitivity", 0, 1), ("specificity", 1, 0)):
        found = at(choose(rule, wanted, scans), scans)
        assert found[of_rule] >= wanted
        assert found[other] == pytest.approx(max(each[other] for each in tried if each[of_rule] >= wanted))


def test_a_threshold_lies_midway_between_scores():
    scans = Scored([True, True, False, False], [0.9, 0.6, 0.2, 0.1], range(4))
    assert choose("sensitivity", 1.0, scans) == pytest.approx(0.4)
    assert choose("sensitivity", 0.5, scans) == pytest.approx(0.75)
    assert choose("specificity", 1.0, scans) == pytest.approx(0.4)
    assert choose("specificity", 0.5, scans) == pytest.approx(0.15)
    assert choose("threshold", 0.33, scans) == 0.33


@pytest.mark.parametrize(("rule", "truth"), [("sensitivity", False), ("specificity", True)])
def test_without_scans_of_the_kind_nothing_is_chosen(rule, truth):
    with pytest.raises(operating_point.NoChoice):
        choose(rule, 0.9, Scored([truth] * 3, [0.2, 0.4, 0.6], range(3)))


RULES = ["f1", {"sensitivity": 0.95}, {"specificity": 1.0}, {"threshold": 0.3}]
WRONG = [
    "f2", 0.5, None, {}, {"sensitivity": 0}, {"sensitivity": 1.1}, {"sensitivity": True}, {"recall": 0.9},
    {"sensitivity": 0.9, "specificity": 0.9}, {"threshold": "0.3"}, ["f1"],
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_read_from_a_request_and_from_params_alike(rule):
    assert parse(rule) == rule
    params = parse_params({"operate_at": rule})
    assert parse_params(json.loads(params.model_dump_json())) == params


@pytest.mark.parametrize("rule", WRONG, ids=str)
def test_another_rule_is_refused(rule):
    with pytest.raises(ValueError, match="Must be f1, or one of"):
        parse(rule)
    with pytest.raises(BadParams, match="operate_at"):
        parse_params({"operate_at": rule})
    assert EXPECTED.endswith(".")


# --- intervals ---


@pytest.mark.parametrize("freedom", [9, 12, 30, 200])
def test_students_quantile_is_scipys(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)


def test_independent_scans_have_wilsons_interval_but_for_few_patients():
    outcomes = [(number < 180, number) for number in range(200)]
    found = share(outcomes)
    exact = stats.binomtest(180, 200).proportion_ci(method="wilson")
    assert (found.value, found.groups) == (0.9, 200)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.002)


def test_slices_of_a_patient_are_no_more_evidence_than_the_patient():
    patients = share([(number < 18, number) for number in range(20)])
    slices = share([(number < 18, number) for number in range(20) for _ in range(30)])
    assert (slices.low, slices.high, slices.groups) == pytest.approx((patients.low, patients.high, 20), abs=1e-9)


def test_a_share_of_all_right_scans_is_not_certain():
    found = share([(True, number // 5) for number in range(60)])
    assert found.high == pytest.approx(1.0)
    assert 0.6 < found.low < 0.80, "12 patients"


@pytest.mark.parametrize(("groups", "known"), [(9, False), (10, True), (0, False)])
def test_below_ten_groups_there_is_no_interval(groups, known):
    found = share([(number % 4 > 0, number) for number in range(groups)])
    assert (found.low is not None, found.groups) == (known, groups)


@pytest.mark.parametrize(("rate", "groups", "slices"), [(0.9, 20, 1), (0.8, 40, 4), (0.95, 60, 10), (0.9, 100, 3)])
def test_nineteen_of_twenty_intervals_hold_the_truth(rate, groups, slices):
    """Patients differ: the intraclass correlation is a fifth."""
    random, held = np.random.default_rng(5), 0
    for _ in range(400):
        rates = random.beta(rate * 4, (1 - rate) * 4, groups)
        hits = random.random((groups, slices)) < rates[:, None]
        found = share([(bool(hit), group) for group, row in enumerate(hits) for hit in row])
        held += found.low <= rate <= found.high
    assert 0.92 <= held / 400 <= 0.99


@pytest.mark.parametrize(("groups", "slices", "wrong"), [(10, 1, 0), (12, 5, 0.1), (40, 3, 0.2), (150, 1, 0.5)])
def test_the_interval_is_that_of_an_evaluation(groups, slices, wrong):
    random = np.random.default_rng(groups)
    group = np.repeat(np.arange(2 * groups), slices)
    labels = group % 2
    predicted = np.where(random.random(len(group)) < wrong, 1 - labels, labels)
    margins = np.where(np.arange(2) == predicted[:, None], 1.0, -1.0)
    expected = intervals(Decisions(labels, predicted, margins, group, 1), 0)
    for name, label in (("recall", 1), ("specificity", 0)):
        scans = labels == label
        found = share([*zip((predicted == labels)[scans].tolist(), group[scans].tolist(), strict=True)])
        assert (found.low, found.high) == pytest.approx((expected[name].low, expected[name].high), abs=1e-3)


# --- of a training ---


def make_outputs(classes: int, seed: int = 2) -> ModelOutputs:
    random = np.random.default_rng(seed)
    names = ("Cancer", "Healthy") if classes == 2 else ("Cyst", "Normal", "Stone", "Tumor")
    sides = []
    for scans in (120, 60):
        labels = np.arange(scans) % classes
        sides += [labels, random.normal(size=(scans, classes)) + 1.5 * np.eye(classes)[labels]]
    positive = None if classes == 2 else ("Cyst", "Stone", "Tumor")
    return ModelOutputs(names, *sides, groups=np.arange(120) // 3, positive=positive)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_training_operates_where_it_was_asked_to(rule):
    outputs = make_outputs(2)
    labels, logits, groups = outputs.validation_labels, outputs.validation_logits, np.arange(60)
    calibration, point = calibrate_at(rule, Choosing(labels, logits, groups), outputs.findings)
    assert calibration.threshold == point.threshold
    assert point.best_f1 == calibrate_at("f1", Choosing(labels, logits, groups), [0])[0].threshold
    called = calibration.decide(logits, [0])
    assert point.sensitivity.value == pytest.approx((called[labels == 0] == 0).mean())
    assert point.specificity.value == pytest.approx((called[labels == 1] == 1).mean())
    if rule == {"sensitivity": 0.95}:
        assert point.sensitivity.value >= 0.95
        assert "sensitivity of 0.95. On 60 validation scans it gave sensitivity 0.9" in sentence(point.as_dict())
    assert json.loads(json.dumps(point.as_dict())) == point.as_dict()


def test_a_rule_that_cannot_choose_is_refused_before_the_training():
    all_healthy = np.ones(20, int)
    with pytest.raises(BadParams, match=r"^operate_at: No scan to choose on is positive"):
        require_choice({"sensitivity": 0.9}, all_healthy, [0])
    require_choice({"specificity": 0.9}, all_healthy, [0])
    require_choice("f1", all_healthy, [0])


def test_without_a_positive_class_there_is_no_point_and_nothing_is_kept():
    outputs = replace(make_outputs(4), positive=())
    labels, logits = outputs.validation_labels, outputs.validation_logits
    assert calibrate_at("f1", Choosing(labels, logits, labels), [])[1] is None
    assert kept_scores(outputs, Calibration(), Choosing(labels, logits, labels)) is None


def test_the_sentence_says_where_patients_are_too_few():
    scans = Scored([True] * 4 + [False] * 4, [0.8] * 8, [0] * 4 + [1] * 4)
    point = operating_point.operating_point("f1", scans, 0.5).as_dict()
    assert "sensitivity 1.000 (too few patients or groups for an interval: 1)" in sentence(point)
    assert shares_at(0.9, scans)[0].value == 0


def test_scores_report_the_models_own_calibration():
    outputs = make_outputs(2)
    own = Calibration(1.7, 0.2, "Its own.")
    scores = score(outputs, own)
    assert (scores.threshold, scores.temperature, scores.calibration) == (0.2, 1.7, "Its own.")
    assert scores.recall == pytest.approx((own.decide(outputs.test_logits, [0])[outputs.test_labels == 0] == 0).mean())
