"""The pooling is chosen on evidence alone, and patients are judged as they are answered."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn

from ml.evaluation.by_patient import by_patient, choose_pooling, patient_labels
from ml.spec.pooling import Pooling

CLASSES = ("Normal", "Tumor")


def patients(number: int, slices: int, positive_slices: int, seed: int, high: float, low: float) -> tuple:
    """Half of the patients positive: so many of their slices get `high` on average, all others `low`."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(number), slices)
    sick = np.repeat(np.arange(number) % 2 == 1, slices)
    seen = sick & (np.tile(np.arange(slices), number) < positive_slices)
    score = np.clip(np.where(seen, high, low) + random.normal(0, 0.03, len(groups)), 0.001, 0.999)
    order = random.permutation(len(groups))
    return seen.astype(int)[order], np.stack([1 - score, score], axis=1)[order], groups[order]


@pytest.mark.parametrize(
    ("labels", "right"),
    [([0, 0, 1], 1), ([0, 0, 0], 0), ([2, 2, 1], 1), ([2, 2, 0], 2), ([1, 3, 3], 3)],
    ids=["any slice", "no slice", "a few positive ones", "most of the negative ones", "of two positives the larger"],
)
def test_a_patient_with_any_positive_slice_is_positive(labels: list[int], right: int) -> None:
    assert patient_labels(np.array(labels), np.zeros(3, int), [1, 3]).tolist() == [right]


def test_a_finding_in_one_slice_of_each_patient_is_found_by_the_highest() -> None:
    labels, probabilities, groups = patients(60, 20, 1, 0, high=0.95, low=0.03)
    chosen = choose_pooling(labels, probabilities, groups, [1])
    assert (chosen.method, chosen.chosen) == ("max", True)
    assert "60 validation patients" in chosen.reason
    told = choose_pooling(labels, probabilities, groups, [1], chosen_on="out_of_fold").reason
    assert "60 out-of-fold patients" in told
    assert "scans" not in told


def test_what_is_not_better_beyond_doubt_is_not_chosen() -> None:
    """All poolings answer all patients alike where all slices of a patient are alike."""
    labels, probabilities, groups = patients(40, 6, 6, 1, high=0.9, low=0.1)
    chosen = choose_pooling(labels, probabilities, groups, [1])
    assert (chosen.method, chosen.k) == ("top", 3)


@pytest.mark.parametrize(("number", "positive"), [(8, [1]), (60, [])], ids=["few patients", "no positive class"])
def test_without_evidence_the_default_says_why(number: int, positive: list[int]) -> None:
    labels, probabilities, groups = patients(number, 20, 1, 0, high=0.95, low=0.03)
    chosen = choose_pooling(labels, probabilities, groups, positive)
    assert (chosen.method, chosen.k, chosen.threshold, chosen.chosen) == ("top", 3, 0.5, False)
    assert f"{number} validation patients" in chosen.reason


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [({"threshold": 0.2}, 0.2), ({"sensitivity": 1.0}, (0.5, 0.95)), ({"specificity": 1.0}, (0.05, 0.9))],
    ids=str,
)
def test_the_threshold_of_patients_follows_the_rule(rule: dict, threshold: object) -> None:
    """Positive patients' highest slice is near 0.95, the others' near 0.1."""
    labels, probabilities, groups = patients(60, 20, 1, 0, high=0.95, low=0.03)
    chosen = choose_pooling(labels, probabilities, groups, [1], rule)
    if isinstance(threshold, tuple):
        low, high = threshold
        assert low <= chosen.threshold <= high
    else:
        assert chosen.threshold == threshold
    assert "Threshold" not in chosen.reason
    assert chosen.best_f1 == choose_pooling(labels, probabilities, groups, [1]).threshold


def test_several_positive_classes_are_one_finding() -> None:
    """Of six patients one of each positive class is taken for the other: all three findings are found."""
    labels = np.array([0, 0, 0, 1, 2, 2])
    probabilities = np.eye(3)[[0, 0, 0, 2, 1, 2]] * 0.94 + 0.02
    found = by_patient(
        ("Normal", "Cyst", "Tumor"), labels, probabilities, np.arange(6), ["Cyst", "Tumor"], Pooling(), 0
    )
    assert (found["recall"], found["specificity"], found["f1"], found["roc_auc"]) == (1.0, 1.0, 1.0, 1.0)
    assert found["accuracy"] == pytest.approx(4 / 6)


def test_chance_moves_the_default_seldom() -> None:
    """200 sets of 12 patients whose scores say nothing of their labels: another pooling wins at most one in ten."""
    random, moved = np.random.default_rng(5), 0
    for _ in range(200):
        groups = np.repeat(np.arange(12), 4)
        score = np.repeat(random.beta(2, 2, 12), 4) * random.uniform(0.8, 1.0, 48)
        labels = np.repeat(random.permutation(12) % 2, 4)
        moved += choose_pooling(labels, np.stack([1 - score, score], axis=1), groups, [1]).method != "top"
    assert moved <= 20


def test_the_figures_of_patients_are_those_of_their_answers() -> None:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 5)
    truth = np.arange(30) % 3 == 0
    score = np.clip(np.repeat(truth * 0.25 + 0.3, 5) + random.normal(0, 0.25, 150), 0.01, 0.99)
    labels = (np.repeat(truth, 5) & (random.random(150) < 0.6)).astype(int)
    truth = np.array([labels[groups == group].any() for group in range(30)])
    pooling = Pooling("top", 2, threshold=0.6)
    found = by_patient(CLASSES, labels, np.stack([1 - score, score], axis=1), groups, ["Tumor"], pooling, 0)
    top = np.array([np.sort(score[groups == group])[-2:].mean() for group in range(30)])
    assert found["patients"] == 30
    assert found["per_class"] == {"Normal": int((~truth).sum()), "Tumor": int(truth.sum())}
    assert found["recall"] == pytest.approx(sklearn.recall_score(truth, top >= 0.6))
    assert found["f1"] == pytest.approx(sklearn.f1_score(truth, top >= 0.6))
    assert found["roc_auc"] == pytest.approx(sklearn.roc_auc_score(truth, top))
    assert found["confusion_matrix"] == sklearn.confusion_matrix(truth, top >= 0.6).tolist()
    low, high = found["intervals"]["specificity"]
    assert low < found["specificity"] < high
    assert found["pooling"]["k"] == 2


def test_a_patient_is_one_case_however_many_slices_it_has() -> None:
    """One patient of 100 slices is wrong, nine of one slice are right: 90 % of the patients, 8 % of the slices."""
    groups = np.array([0] * 100 + list(range(1, 10)))
    labels = np.array([1] * 100 + [0] * 9)
    probabilities = np.tile([0.9, 0.1], (109, 1))
    found = by_patient(CLASSES, labels, probabilities, groups, ["Tumor"], Pooling(), 0)
    assert (found["accuracy"], found["specificity"], found["recall"]) == (pytest.approx(0.9), 1.0, 0.0)
