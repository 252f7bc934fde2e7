"""The positive class: what names tell, what a person says, and what a model file carries."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from jobs.models.gate import GatePolicy, gate
from ml.evaluation import positive
from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import ModelOutputs, log_odds, score
from ml.runtime.config import parse_params
from ml.runtime.errors import BadParams
from ml.spec.positive_class import is_finding

KIDNEY = ("Cyst", "Normal", "Stone", "Tumor")


@pytest.mark.parametrize(
    ("classes", "finding"),
    [
        (("Cancer", "Healthy"), "Cancer"),
        (("Normal", "Tumor"), "Tumor"),
        (("Tumor", "healthy"), "Tumor"),
        (("benign", "malignant"), "malignant"),
        (("negative", "positive"), "positive"),
        (("no_tumor", "tumor"), "tumor"),
        (("NoTumor", "Tumor"), "Tumor"),
        (("notumor", "yes"), "yes"),
        (("cancer", "non-cancer"), "cancer"),
        (("Disease", "Control"), "Disease"),
        (("0", "1"), "1"),
        (("0_normal", "1_stone"), "1_stone"),
        (("Angiomyolipoma", "Normal"), "Angiomyolipoma"),
        (("covid", "covid negative"), "covid"),
        (("malignant tumor", "benign tumor"), "malignant tumor"),
        (("no", "yes"), "yes"),
    ],
)
def test_names_decide_where_one_reading_is_possible(classes, finding):
    assert positive.resolve(classes) == (finding,)
    assert positive.resolve(classes[::-1]) == (finding,), "their order says nothing"


@pytest.mark.parametrize(
    "classes",
    [
        ("Cyst", "Tumor"), ("a", "b"), ("left", "right"), ("Angiomyolipoma", "Tumor"), ("benign", "normal"),
        ("control", "healthy"), ("normal tumor", "tumor"), ("2", "3"), ("abnormal", "tumor"), ("MR", "CT"),
    ],
)  # fmt: skip
def test_names_that_leave_it_open_ask_for_the_parameter(classes):
    with pytest.raises(BadParams, match=r"^positive: ") as refused:
        positive.resolve(classes)
    assert all(name in str(refused.value) for name in classes)
    assert positive.resolve(classes, [classes[0]]) == (classes[0],)


@pytest.mark.parametrize(("name", "known"), [("node", None), ("nodule", True), ("abnormal", True), ("Not_Sick", False)])
def test_a_name_is_read_by_whole_words(name, known):
    assert is_finding(name) is known


def test_a_person_overrules_the_names():
    assert positive.resolve(("Cancer", "Healthy"), ["Healthy"]) == ("Healthy",)


def test_of_more_than_two_classes_those_are_positive_that_are_named():
    assert positive.resolve(KIDNEY) == ()
    assert positive.resolve(KIDNEY, ["Tumor", "Cyst"]) == ("Tumor", "Cyst")


@pytest.mark.parametrize(("asked", "said"), [(["Mass"], "no class Mass"), (["Cancer", "Healthy"], "one at least")])
def test_what_is_asked_for_must_be_there_and_leave_a_negative_class(asked, said):
    with pytest.raises(BadParams, match=said) as refused:
        positive.resolve(("Cancer", "Healthy"), asked)
    assert "Cancer, Healthy" in str(refused.value)


def test_a_model_file_says_it_and_an_older_one_keeps_the_rule_that_it_was_trained_with():
    classes = ("Cancer", "Healthy")
    assert positive.of_model({"positive": ["Cancer"]}, classes) == ("Cancer",)
    assert positive.of_model({}, classes) == ("Healthy",), "the last of two, as it was trained"
    assert positive.of_model({}, ("Tumor", "Well")) == ("Tumor",)
    assert positive.of_model({}, KIDNEY) == ()


def test_the_score_is_the_sum_of_the_positive_probabilities():
    probabilities = np.array([[0.1, 0.6, 0.2, 0.1], [0.3, 0.1, 0.2, 0.4]])
    assert positive.score(probabilities, KIDNEY, ("Cyst", "Tumor")) == pytest.approx([0.2, 0.7])


@pytest.mark.parametrize("given", ["Cancer", ["Cancer", "Cyst"], None])
def test_the_parameter_takes_a_class_or_several(given):
    asked = parse_params({"positive": given}).asked_positive
    assert asked == ((given,) if isinstance(given, str) else given and tuple(given))


# --- what the figures are of ---


def missing(half: int) -> ModelOutputs:
    """30 cancers of which `half` are missed, and 30 healthy that are all called healthy; all are other patients."""
    labels = np.repeat([0, 1], 30)
    predicted = np.concatenate([np.repeat([0, 1], [30 - half, half]), np.ones(30, int)])
    return ModelOutputs(("Cancer", "Healthy"), labels, np.eye(2)[predicted] * 4.0)


def test_half_of_the_cancers_missed_reads_a_sensitivity_of_a_half():
    scores = score(missing(15))
    assert (scores.positive, scores.recall, scores.specificity) == (["Cancer"], 0.5, 1.0)


def test_a_first_champion_that_misses_half_of_the_cancers_is_refused():
    known = {"patients_known": True, "leaks": {}}
    refused, let_in = (gate(score(missing(half)).as_dict() | known, None, "auto", GatePolicy()) for half in (15, 1))
    assert not refused.promoted
    assert any("ensitivity" in reason and "0.5" in reason for reason in refused.reasons)
    assert let_in.promoted, let_in.reasons


def test_several_positive_classes_are_scored_as_one_finding():
    random = np.random.default_rng(3)
    labels = np.arange(200) % 4
    logits = random.normal(size=(200, 4)) + np.eye(4)[labels]
    scores = score(ModelOutputs(KIDNEY, labels, logits, positive=("Tumor", "Stone")), Calibration(1.0, 0.4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth, ranking = np.isin(labels, [2, 3]), probabilities[:, 2] + probabilities[:, 3]
    found = ranking >= 0.4
    assert scores.recall == pytest.approx(sklearn.metrics.recall_score(truth, found))
    assert scores.precision == pytest.approx(sklearn.metrics.precision_score(truth, found))
    assert scores.f1 == pytest.approx(sklearn.metrics.f1_score(truth, found))
    assert scores.specificity == pytest.approx(sklearn.metrics.recall_score(~truth, ~found))
    assert scores.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(truth, ranking))
    assert scores.pr_auc == pytest.approx(sklearn.metrics.average_precision_score(truth, ranking))
    called = np.where(found, 2 + probabilities[:, 2:].argmax(axis=1), probabilities[:, :2].argmax(axis=1))
    assert scores.accuracy == pytest.approx((called == labels).mean())
    assert scores.confusion_matrix == sklearn.metrics.confusion_matrix(labels, called).tolist()


def test_log_odds_of_several_classes_are_those_of_their_sum():
    logits = np.random.default_rng(1).normal(size=(5, 4)) * 30
    together = log_odds(logits, 1.0, [0, 2])
    direct = np.logaddexp(logits[:, 0], logits[:, 2]) - np.logaddexp(logits[:, 1], logits[:, 3])
    assert together == pytest.approx(direct)
