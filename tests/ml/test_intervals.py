"""95 % intervals by patient: against closed forms, and against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.coverage.simulation import LEAST, MOST, SIZES, Network, Size, coverage, drawn, truth
from ml.evaluation.intervals import MAX_BLOCKS, MIN_GROUPS, Decisions, figures, groups_per_class, intervals, t_quantile

TRIALS = 150


def scored(right: list[list[bool]], labels: list[int]) -> Decisions:
    """Groups of scans, each scan right or not, of two classes."""
    groups = np.repeat(np.arange(len(right)), [len(each) for each in right])
    truths = np.array(labels)[groups]
    predicted = np.where(np.concatenate(right), truths, 1 - truths)
    margins = np.where(predicted == 1, 1.0, -1.0) * np.linspace(1, 2, len(groups))
    return Decisions(truths, predicted, np.stack([-margins, margins], axis=1), groups, 1)


def singles(positives: int, negatives: int, missed: int, alarms: int) -> Decisions:
    """Groups of one scan."""
    right = [[number >= missed] for number in range(positives)] + [[number >= alarms] for number in range(negatives)]
    return scored(right, [1] * positives + [0] * negatives)


# --- when there is one ---


@pytest.mark.parametrize(
    ("positives", "negatives", "given"),
    [(1, 1, False), (9, 9, False), (9, 200, False), (200, 9, False), (10, 10, True), (10, 200, True)],
)
def test_an_interval_needs_ten_groups_of_each_class(positives: int, negatives: int, given: bool) -> None:
    found = intervals(singles(positives, negatives, 1, 1), 0)
    assert {each is not None for each in found.values()} == {given}


def test_slices_do_not_count_as_groups() -> None:
    made = scored([[True] * 40] * 6, [0, 0, 0, 1, 1, 1])
    assert groups_per_class(made) == [3, 3]
    assert set(intervals(made, 0).values()) == {None}


def test_a_class_without_test_scans_leaves_no_interval() -> None:
    made = singles(20, 20, 1, 1)
    three = Decisions(made.labels, made.predicted, np.zeros((40, 3)), made.groups, None)
    assert groups_per_class(three) == [20, 20, 0]
    assert set(intervals(three, 0).values()) == {None}


def test_a_patient_of_both_classes_counts_once_for_that_of_most_scans() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0])
    made = Decisions(labels, labels, np.zeros((6, 2)), np.array([5, 5, 5, 8, 8, 9]), 1)
    assert groups_per_class(made) == [2, 1]


# --- against closed forms ---


def test_students_quantile_is_scipys() -> None:
    for freedom in (1, 9, 9.7, 19, 200):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize(("count", "missed"), [(12, 3), (40, 4), (150, 30)])
def test_the_interval_of_recall_is_wilsons_with_t_for_patients_of_one_scan(count: int, missed: int) -> None:
    # The variance of a mean of 0 and 1, s² / n, with 0.2 of a right and 0.2 of a wrong patient added to the mean.
    found = intervals(singles(count, 25, missed, 2), 0)["recall"]
    rate, t = 1 - missed / count, stats.t.ppf(0.975, count - 1)
    centre = (count - missed + 0.2) / (count + 0.4)
    variance = rate * (1 - rate) / (count - 1) * (count / (count + 0.4)) ** 2
    cases = centre * (1 - centre) / variance
    roots = np.roots([1 + t**2 / cases, -2 * rate - t**2 / cases, rate**2])  # (p - rate)² = t² p (1 - p) / cases
    assert (found.low, found.high) == pytest.approx(sorted(roots), abs=1e-4)


def test_slices_that_are_right_together_say_no_more_than_their_patient() -> None:
    right = [[number % 5 != 0] * 8 for number in range(40)]
    many, one = scored(right, [0, 1] * 20), scored([each[:1] for each in right], [0, 1] * 20)
    of_many, of_one = (intervals(made, 0) for made in (many, one))
    for name in ("accuracy", "recall", "specificity", "f1"):
        assert of_many[name].low == pytest.approx(of_one[name].low, abs=1e-6)


@pytest.mark.parametrize("groups", [10, 20, 60, 150])
def test_all_right_still_has_the_interval_of_clopper_and_pearson(groups: int) -> None:
    found = intervals(singles(groups, groups, 0, 0), 0)
    assert found["recall"].high == 1.0
    assert found["recall"].low == pytest.approx(0.025 ** (1 / groups), abs=0.01)
    assert all(each.low < 0.999 for each in found.values())


def test_a_class_that_is_all_right_adds_variance_to_figures_of_both() -> None:
    mixed = intervals(singles(20, 20, 4, 0), 0)
    assert 0.6 < mixed["precision"].low < 0.95
    assert mixed["specificity"].low < 0.9


def test_more_groups_than_blocks_give_the_same_within_a_hundredth() -> None:
    size = Size((MAX_BLOCKS * 3, MAX_BLOCKS * 3), 1)
    made = drawn(size, Network(2.4, 1.2, 0.5), np.random.default_rng(3))
    found, count = intervals(made, 0)["recall"], MAX_BLOCKS * 3
    rate = float(figures(np.ones((1, count * 2)), made)["recall"][0])
    exact = stats.norm.ppf(0.975) * np.sqrt(rate * (1 - rate) / count)
    assert found.high - found.low == pytest.approx(2 * exact, rel=0.2)


# --- against the truth ---


def test_the_simulated_truth_is_that_of_many_patients() -> None:
    network, size = Network(2.5, 1.0, 0.4), Size((60_000, 20_000), 1)
    made = drawn(size, network, np.random.default_rng(0))
    found, true = figures(np.ones((1, 80_000)), made), truth(size, network)
    assert {name: float(found[name][0]) for name in true} == pytest.approx(true, abs=0.006)


QUICK = (Size((10, 10), 1), Size((10, 10), 6), Size((24, 24), 2), Size((90, 10), 4))


@pytest.mark.parametrize("size", QUICK, ids=str)
def test_intervals_hold_the_truth_as_often_as_they_say(size: Size) -> None:
    rows = coverage(size, TRIALS, seed=16)
    allowed = 2.6 * np.sqrt(0.05 * 0.95 / TRIALS) * 100  # what chance may add in so few trials
    assert {name: row.coverage for name, row in rows.items() if row.coverage < LEAST - allowed} == {}


@pytest.mark.full
@pytest.mark.parametrize("size", [size for size in SIZES if sum(size.patients) * size.slices <= 2000], ids=str)
def test_intervals_of_every_size_hold_92_to_98_percent_or_are_not_given(size: Size) -> None:
    rows = coverage(size, 500, seed=1)
    slack = 2.0  # of two standard errors in 500 trials; `make bench-coverage` has more of them
    told = {name: row.coverage for name, row in rows.items()}
    if min(size.patients) < MIN_GROUPS:
        assert set(told.values()) == {None}
    else:
        assert {name: value for name, value in told.items() if not LEAST - slack <= value <= MOST + slack} == {}
