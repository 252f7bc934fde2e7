"""Scores: hand-counted."""

from __future__ import annotations

import numpy as np
import pytest

from ml.metrics import positive_class, score


def logits_for(predicted: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted] * 4


def test_two_classes_are_scored_by_the_positive_one():
    scores = score(np.array([0, 0, 0, 1, 1]), logits_for([0, 0, 1, 1, 0]), ("Normal", "Tumor"))
    assert scores.accuracy == pytest.approx(3 / 5)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert scores.confusion_matrix == [[2, 1], [1, 1]]
    assert scores.per_class["Normal"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores.held_out == 5


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (("Normal", "Tumor"), "Tumor"),
        (("Tumor", "healthy"), "Tumor"),
        (("tumour", "well"), "tumour"),
        (("a", "b"), "b"),
        (("a", "b", "c"), None),
    ],
)
def test_the_positive_class_is_the_finding(classes, positive):
    assert positive_class(classes) == positive


def test_more_classes_are_scored_by_macro_means():
    scores = score(np.array([0, 1, 2, 2]), logits_for([0, 1, 2, 1], 3), ("a", "b", "c"))
    assert scores.recall == pytest.approx((1 + 1 + 0.5) / 3)
    assert scores.positive is None


def test_a_class_that_is_never_predicted_scores_zero():
    assert score(np.array([0, 1]), logits_for([0, 0]), ("a", "b")).f1 == 0


def test_the_loss_is_the_cross_entropy():
    scores = score(np.array([1]), np.array([[0.0, 1.0]], np.float32), ("a", "b"))
    assert scores.loss == pytest.approx(np.log(1 + np.exp(-1)))
    assert np.isfinite(score(np.array([0]), np.array([[-1e4, 1e4]], np.float32), ("a", "b")).loss)
