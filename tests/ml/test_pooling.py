"""One answer for several slices, against values computed by hand and against probability itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ml.spec.pooling import Pooling, pooled

TOP3, MAX, NOISY = Pooling(), Pooling("max", 1), Pooling("noisy_or")

POOLED = {
    "the highest": (MAX, [0.1, 0.7, 0.4], 0.7),
    "the mean of three": (TOP3, [0.1, 0.9, 0.2, 0.4], 0.5),
    "of fewer than three all": (TOP3, [0.2, 0.4], 0.3),
    "of one itself": (TOP3, [0.25], 0.25),
    "a certain slice decides noisy-or": (NOISY, [0.1, 1.0], 1.0),
    "two coins": (NOISY, [0.5, 0.5], 0.75),
    "a thousand rare ones": (NOISY, [1e-6] * 1000, 1 - (1 - 1e-6) ** 1000),
}


@pytest.mark.parametrize(("pooling", "scores", "right"), POOLED.values(), ids=POOLED)
def test_scores_are_pooled(pooling: Pooling, scores: list[float], right: float) -> None:
    assert pooling.pool(scores) == pytest.approx(right, rel=1e-9)


def test_noisy_or_is_the_probability_that_any_of_independent_slices_is_positive() -> None:
    scores = [0.3, 0.05, 0.6]
    outcomes = itertools.product([False, True], repeat=3)
    chance = sum(
        math.prod(score if hit else 1 - score for score, hit in zip(scores, hits, strict=True))
        for hits in outcomes
        if any(hits)
    )
    assert NOISY.pool(scores) == pytest.approx(chance)


def test_the_deciding_slices_are_those_that_the_score_is_made_of() -> None:
    scores = [0.1, 0.9, 0.2, 0.4, 0.8]
    assert MAX.deciding(scores) == [1]
    assert TOP3.deciding(scores) == [1, 4, 3]
    assert np.mean([scores[position] for position in TOP3.deciding(scores)]) == pytest.approx(TOP3.pool(scores))


def test_of_two_classes_the_threshold_decides_not_the_larger_one() -> None:
    slices = [{"Cancer": 0.45, "Healthy": 0.55}, {"Cancer": 0.35, "Healthy": 0.65}]
    low = Pooling(threshold=0.4)
    assert pooled(slices, ["Cancer"], TOP3).label == "Healthy"
    answer = pooled(slices, ["Cancer"], low)
    assert (answer.label, answer.confidence, answer.score) == ("Cancer", pytest.approx(0.4), pytest.approx(0.4))
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_several_positive_classes_count_together_and_the_likeliest_of_them_is_the_label() -> None:
    slices = [{"Cyst": 0.3, "Normal": 0.3, "Tumor": 0.4}, {"Cyst": 0.05, "Normal": 0.9, "Tumor": 0.05}]
    answer = pooled(slices, ["Cyst", "Tumor"], MAX)
    assert (answer.label, answer.score, answer.deciding) == ("Tumor", pytest.approx(0.7), [0])
    assert answer.probabilities == pytest.approx({"Cyst": 0.3, "Normal": 0.3, "Tumor": 0.4})


def test_one_positive_slice_decides_where_a_finding_is_known_and_not_where_none_is() -> None:
    slices = [{"A": 0.95, "B": 0.03, "C": 0.02}] + [{"A": 0.1, "B": 0.8, "C": 0.1}] * 4
    assert pooled(slices, ["A"], MAX).label == "A"
    answer = pooled(slices, [], MAX)
    assert (answer.label, answer.score) == ("B", None)
    assert answer.probabilities["A"] == pytest.approx((0.95 + 4 * 0.1) / 5)


def test_a_model_without_a_pooling_says_so() -> None:
    assert Pooling.of({}) == Pooling.of(None) == Pooling()
    assert not Pooling().chosen
    assert "names no pooling" in Pooling().reason
    chosen = Pooling("max", 1, 0.4, True, "Chosen.")
    assert Pooling.of({"pooling": chosen.as_dict()}) == chosen
