"""Paired tests by patient: against scipy, brute force and permutations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from ml.evaluation import intervals
from ml.evaluation.intervals import Decisions
from ml.evaluation.paired import delong, differences, mcnemar, paired


def pair(
    positives: int, negatives: int, slices: int, separations: tuple[float, float], seed: int
) -> tuple[Decisions, Decisions]:
    """Two networks on the same scans, which both find the same patients and the same scans hard."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(positives + negatives), slices)
    labels = (groups < positives).astype(np.int64)

    def noise() -> np.ndarray:
        return 0.7 * random.standard_normal(positives + negatives)[groups] + 0.71 * random.standard_normal(len(groups))

    shared, made = noise(), []
    for separation in separations:
        scores = separation * (labels - 0.5) + 0.77 * shared + 0.64 * noise()
        made.append(Decisions(labels, (scores > 0).astype(np.int64), np.stack([-scores, scores], axis=1), groups, 1))
    return made[0], made[1]


# --- McNemar ---


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_of_single_scans_is_the_textbooks(seed: int) -> None:
    ours, theirs = pair(60, 60, 1, (2.5, 1.5), seed)
    right, other = ours.predicted == ours.labels, theirs.predicted == theirs.labels
    better, worse = (right & ~other).sum(), (other & ~right).sum()
    found = mcnemar(ours, theirs)
    assert found.statistic == pytest.approx((better - worse) ** 2 / (better + worse))
    assert found.p == pytest.approx(stats.chi2.sf(found.statistic, 1))


def test_mcnemar_by_groups_is_near_the_test_that_swaps_the_networks_of_whole_patients() -> None:
    ours, theirs = pair(40, 40, 6, (3.0, 2.4), 5)
    right = (ours.predicted == ours.labels).astype(float) - (theirs.predicted == theirs.labels)
    of_patient = np.bincount(ours.groups, right) / np.bincount(ours.groups)
    signs = np.random.default_rng(0).choice([-1, 1], (20_000, len(of_patient)))
    permuted = (np.abs(signs @ of_patient) >= abs(of_patient.sum()) - 1e-12).mean()
    assert mcnemar(ours, theirs).p == pytest.approx(permuted, abs=0.03)


def test_slices_of_one_patient_are_no_more_evidence_than_the_patient() -> None:
    ours, theirs = pair(40, 40, 1, (3.0, 2.0), 1)
    many = [
        Decisions(*(np.repeat(each, 20, axis=0) for each in (d.labels, d.predicted, d.margins, d.groups)), d.positive)
        for d in (ours, theirs)
    ]
    assert mcnemar(*many) == mcnemar(ours, theirs)
    assert delong(*many).p == pytest.approx(delong(ours, theirs).p)
    one, more = differences(ours, theirs, 0)["f1"], differences(many[0], many[1], 0)["f1"]
    assert (more.low, more.high) == pytest.approx((one.low, one.high), abs=0.03)


# --- DeLong ---


def brute_force(ours: Decisions, theirs: Decisions) -> float:
    """DeLong's statistic from all pairs of scans, by the covariance matrices of his paper."""
    positive = ours.labels == 1
    structural = []
    for each in (ours, theirs):
        score = each.margins[:, 1]
        pairs = [[float(p > n) + 0.5 * float(p == n) for n in score[~positive]] for p in score[positive]]
        structural.append(np.array(pairs))
    of_positives, of_negatives = (np.cov([each.mean(axis=axis) for each in structural]) for axis in (1, 0))
    covariance = of_positives / positive.sum() + of_negatives / (~positive).sum()
    contrast = np.array([1, -1])
    gap = structural[0].mean() - structural[1].mean()
    return float(gap**2 / (contrast @ covariance @ contrast))


@pytest.mark.parametrize(("seed", "rounded"), list(product(range(3), [False, True])))
def test_delong_of_single_scans_is_that_of_all_pairs(seed: int, rounded: bool) -> None:
    made = pair(30, 45, 1, (2.5, 1.5), seed)
    if rounded:  # ties
        made = tuple(Decisions(d.labels, d.predicted, d.margins.round(), d.groups, 1) for d in made)
    found = delong(*made)
    assert found.statistic == pytest.approx(brute_force(*made))
    assert found.p == pytest.approx(stats.chi2.sf(found.statistic, 1))


def test_delong_by_groups_has_the_error_of_a_bootstrap_of_patients() -> None:
    ours, theirs = pair(50, 50, 8, (3.0, 2.4), 2)
    found = delong(ours, theirs)
    random, gaps = np.random.default_rng(0), []
    positive = ours.labels == 1
    for _ in range(800):
        drawn = np.concatenate([random.integers(0, 50, 50), random.integers(50, 100, 50)])
        scans = (drawn[:, None] * 8 + np.arange(8)).ravel()
        areas = []
        for each in (ours, theirs):
            score, truth = each.margins[scans, 1], positive[scans]
            ranks = stats.rankdata(score)
            areas.append((ranks[truth].sum() - 400 * 401 / 2) / (400 * 400))
        gaps.append(areas[0] - areas[1])
    gap = differences(ours, theirs, 0)["roc_auc"].difference
    assert gap**2 / found.statistic == pytest.approx(np.var(gaps), rel=0.15)


def test_equal_networks_do_not_differ() -> None:
    ours, _ = pair(30, 30, 4, (2.5, 2.5), 0)
    found = paired(ours, ours, 0)
    assert found["groups"] == 60
    assert found["mcnemar"] == found["delong"] == {"statistic": 0.0, "p": 1.0}
    f1 = found["differences"]["f1"]
    assert f1["difference"] == 0
    assert -0.05 < f1["low"] < 0 < f1["high"] < 0.05, "one more patient might divide them"


# --- differences ---


def test_a_difference_is_that_of_the_figures_and_its_error_that_of_resampled_patients() -> None:
    ours, theirs = pair(60, 40, 5, (3.0, 2.0), 3)
    random, gaps = np.random.default_rng(1), []

    def f1(decisions: Decisions, scans: np.ndarray) -> float:
        truth, called = decisions.labels[scans] == 1, decisions.predicted[scans] == 1
        return float(2 * (truth & called).sum() / (truth.sum() + called.sum()))

    for _ in range(1500):
        drawn = np.concatenate([random.integers(0, 60, 60), random.integers(60, 100, 40)])
        scans = (drawn[:, None] * 5 + np.arange(5)).ravel()
        gaps.append(f1(ours, scans) - f1(theirs, scans))
    found, every = differences(ours, theirs, 0)["f1"], np.arange(500)
    assert found.difference == pytest.approx(f1(ours, every) - f1(theirs, every))
    reach = stats.t.ppf(0.975, 39) * np.std(gaps) * np.sqrt(40 / 39)
    assert (found.low, found.high) == pytest.approx((found.difference - reach, found.difference + reach), abs=0.006)


def test_the_other_way_round_a_difference_has_the_other_sign() -> None:
    ours, theirs = pair(30, 30, 2, (3.0, 2.0), 4)
    one, other = differences(ours, theirs, 0)["f1"], differences(theirs, ours, 0)["f1"]
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


@pytest.mark.parametrize(("positives", "negatives"), [(9, 60), (60, 9), (3, 3)])
def test_fewer_than_ten_patients_of_a_class_leave_the_difference_without_interval(
    positives: int, negatives: int
) -> None:
    found = differences(*pair(positives, negatives, 10, (3.0, 2.0), 0), 0)["f1"]
    assert (found.low, found.high) == (None, None)


def test_three_classes_have_differences_and_no_delong() -> None:
    labels = np.repeat([0, 1, 2], 20)
    made = []
    for seed in (0, 1):
        scores = 2.0 * np.eye(3)[labels] + np.random.default_rng(seed).standard_normal((60, 3))
        made.append(Decisions(labels, scores.argmax(axis=1), scores, np.arange(60), None))
    found = paired(made[0], made[1], 0)
    assert found["delong"] is None
    assert found["differences"]["f1"]["low"] < found["differences"]["f1"]["high"]


def test_the_intervals_of_equally_good_networks_hold_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    held = {"f1": 0, "roc_auc": 0}
    refused = 0
    for seed in range(120):
        made = pair(24, 24, 2, (2.8, 2.8), seed)
        refused += mcnemar(*made).p < 0.05
        for name, found in differences(*made, seed).items():
            held[name] += found.low <= 0 <= found.high
    assert {name: count >= 0.88 * 120 for name, count in held.items()} == dict.fromkeys(held, True)
    assert refused <= 0.11 * 120
