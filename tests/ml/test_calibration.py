"""Temperature, threshold and calibration error, also with few scans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax as scipy_log_softmax

from ml.evaluation.calibration import (
    Calibration,
    calibrate,
    chance_error,
    choose_threshold,
    cross_entropy,
    fit_temperature,
    reliability,
    softmax,
    top_label,
)
from ml.image.dataset.splits import Split
from ml.image.engines.features import Features
from ml.image.learning.train import TrainConfig, TrainData, logits_of, train
from ml.image.stages.training import head_forward
from tests.ml.builders import CountingBackbone, make_narrow_model, make_params, make_scans

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(2, 5)), elements=st.floats(-50, 50, width=32))


def make_answers(
    scans: int, seed: int = 0, scale: float = 1.0, lean: float = 0.0, prevalence: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [scans] and logits [scans, 2] of a calibrated network, scaled by `scale`, then biased."""
    random = np.random.default_rng(seed)
    labels = (random.random(scans) < prevalence).astype(np.int64)
    labels[:2] = (0, 1)
    seen = random.normal(np.where(labels == 1, 1, -1))
    log_odds = scale * (2 * seen + np.log(prevalence / (1 - prevalence))) + lean
    return labels, np.stack([np.zeros(scans), log_odds], axis=1).astype(np.float32)


def f1(labels: np.ndarray, called: np.ndarray) -> float:
    return 2 * (called & (labels == 1)).sum() / (called.sum() + labels.sum())


# --- temperature ---


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_made_the_network_too_sure(scale):
    labels, logits = make_answers(4000, scale=scale)
    assert fit_temperature(labels, logits)[0] == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize(("scans", "worst"), [(20, 0.15), (46, 0.12), (100, 0.12), (400, 0.03)])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_never_harms_much_however_few_scans_there_are(scans, worst, scale):
    unseen = make_answers(4000, seed=1, scale=scale)
    gains = []
    for seed in range(2, 42):
        temperature, _ = fit_temperature(*make_answers(scans, seed, scale))
        gains.append(cross_entropy(*unseen) - cross_entropy(*unseen, temperature))
    assert min(gains) > -worst
    assert np.mean(gains) > (-0.02 if scale == 1.0 else 0.02)


def test_a_perfectly_separated_validation_set_leaves_the_temperature_at_one():
    labels = np.arange(46) % 2
    temperature, reason = fit_temperature(labels, np.eye(2, dtype=np.float32)[labels] * 5)
    assert temperature == 1.0
    assert "without a mistake" in reason


def test_one_slight_mistake_among_sure_answers_does_not_send_the_temperature_to_zero():
    labels = np.arange(46) % 2
    logits = np.eye(2, dtype=np.float32)[labels] * 5
    logits[0] = [0, 0.01]
    assert 0.3 < fit_temperature(labels, logits)[0] < 3


def test_answers_that_are_all_wrong_leave_the_temperature_within_bounds():
    labels = np.arange(46) % 2
    temperature, _ = fit_temperature(labels, np.eye(2, dtype=np.float32)[1 - labels] * 1000)
    assert 0.05 < temperature < 20


@pytest.mark.parametrize("scans", [0, 1, 9])
def test_too_few_scans_choose_nothing(scans):
    labels, logits = make_answers(20)
    chosen = calibrate(labels[:scans], logits[:scans], positive=[1])
    assert (chosen.temperature, chosen.threshold) == (1.0, 0.5)
    assert f"{scans} validation scans" in chosen.reason


@given(LOGITS, st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_of_the_classes(logits, temperature):
    scaled = softmax(logits, temperature)
    assert scaled.sum(axis=1) == pytest.approx(np.ones(len(logits)))
    best = scaled[np.arange(len(logits)), logits.argmax(axis=1)]
    assert (best >= scaled.max(axis=1) - 1e-12).all()


@given(LOGITS)
def test_the_cross_entropy_is_that_of_scipy(logits):
    labels = np.arange(len(logits)) % logits.shape[1]
    expected = -scipy_log_softmax(logits.astype(float), axis=1)[np.arange(len(logits)), labels].mean()
    assert cross_entropy(labels, logits) == pytest.approx(expected, abs=1e-9)


# --- threshold ---


@pytest.mark.parametrize("prevalence", [0.5, 0.15])
@pytest.mark.parametrize("scans", [20, 46, 100, 400])
def test_the_chosen_threshold_is_on_average_no_worse_than_a_half(scans, prevalence):
    labels, logits = make_answers(20_000, seed=1, prevalence=prevalence)
    probability, gains = softmax(logits)[:, 1], []
    for seed in range(2, 82):
        known, answers = make_answers(scans, seed, prevalence=prevalence)
        threshold, _ = choose_threshold(known == 1, softmax(answers)[:, 1])
        gains.append(f1(labels, probability >= threshold) - f1(labels, probability >= 0.5))
    assert np.mean(gains) > -0.004


def test_the_chosen_threshold_mends_a_network_that_leans_to_one_side():
    labels, logits = make_answers(20_000, seed=1, lean=-2)
    probability = softmax(logits)[:, 1]
    known, answers = make_answers(100, seed=2, lean=-2)
    threshold, reason = choose_threshold(known == 1, softmax(answers)[:, 1])
    assert f1(labels, probability >= threshold) > f1(labels, probability >= 0.5) + 0.1
    assert "grew by" in reason


def test_validation_scans_of_one_class_leave_the_threshold_alone():
    assert choose_threshold(np.ones(30, bool), np.linspace(0, 1, 30))[0] == 0.5


def test_equal_probabilities_leave_the_threshold_alone():
    assert choose_threshold(np.arange(30) % 2 == 1, np.full(30, 0.2))[0] == 0.5


def test_more_than_two_classes_have_no_threshold():
    assert calibrate(np.zeros(0, np.int64), np.zeros((0, 3)), positive=[]).threshold is None


@pytest.mark.parametrize(("positive", "expected"), [(1, [0, 1, 1]), (0, [0, 0, 1])])
def test_a_scan_is_positive_from_the_threshold_on(positive, expected):
    probabilities = np.array([[0.75, 0.25], [0.7, 0.3], [0.2, 0.8]])
    threshold = 0.3 if positive == 1 else 0.7
    decided = Calibration(1.0, threshold - 1e-9).decide(np.log(probabilities), [positive])
    assert decided.tolist() == expected


def test_without_a_threshold_the_most_probable_class_is_called():
    assert Calibration(2.0).decide(np.array([[0.0, 3.0, 1.0]]), []).tolist() == [1]


# --- calibration error ---


def test_the_calibration_error_is_the_weighted_gap_of_the_bins():
    right = np.array([True, False, True, True])
    bins = reliability(right, np.array([0.51, 0.52, 0.99, 0.98]))
    assert bins.scans.tolist() == [2, 2]
    assert bins.error == pytest.approx((2 * abs(0.515 - 0.5) + 2 * abs(0.985 - 1)) / 4)


def test_a_bin_is_closed_above():
    assert reliability(np.array([True, True]), np.array([10 / 15, 10.01 / 15])).scans.tolist() == [1, 1]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=50))
def test_the_calibration_error_lies_between_0_and_1(pairs):
    right, confidence = (np.array(values) for values in zip(*pairs, strict=True))
    assert 0 <= reliability(right, confidence).error <= 1 + 1e-12


def test_few_scans_show_a_calibration_error_by_chance_alone():
    few, many = (chance_error(top_label(*_calibrated(scans))[1], seed=0) for scans in (93, 9300))
    assert few > 3 * many
    found = [reliability(*top_label(*_calibrated(93, seed))).error for seed in range(40)]
    assert few == pytest.approx(np.mean(found), rel=0.25)


def _calibrated(scans: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels, logits = make_answers(scans, seed)
    return labels, softmax(logits)


@settings(max_examples=20)
@given(st.permutations(range(60)))
def test_the_order_of_the_scans_does_not_matter(order):
    labels, logits = make_answers(60, scale=2, lean=-1)
    first, second = calibrate(labels, logits, [1]), calibrate(labels[order], logits[order], [1])
    assert second.temperature == pytest.approx(first.temperature, rel=1e-6)
    assert second.threshold == pytest.approx(first.threshold, rel=1e-6)


# --- with a training -------------------------------------------------------------------------------------------------


def test_an_overfitted_network_is_less_sure_after_calibration_and_rightly_so():
    """A head that has memorized 80 scans, a fifth of them with the wrong label, is overconfident on others.

    Temperature scaling on one half of these corrects it on the other half.
    """
    scans, model = 400, make_narrow_model(dropout=0.0)
    random = np.random.default_rng(0)
    labels = (np.arange(scans) + (random.random(scans) < 0.2)) % 2
    train_scans, validation, test = np.arange(80), np.arange(80, 240), np.arange(240, scans)
    features = Features(CountingBackbone(), make_scans(scans))
    data = TrainData(lambda top: features, labels, Split(train_scans, validation, test), positive=(1,))
    params = make_params(epochs=60, learning_rate=0.003, keep="last", augmentation=False)
    history = list(train(TrainConfig(model, params), data))
    assert history[-1].train_accuracy == 1.0, "it was learnt by heart"
    chosen, unseen = (logits_of(head_forward(model), features, some).numpy() for some in (validation, test))
    temperature, _ = fit_temperature(labels[validation], chosen)
    before, after = (reliability(*top_label(labels[test], softmax(unseen, t))).error for t in (1.0, temperature))
    assert temperature > 1.5
    assert before > 0.2
    assert after < 0.5 * before
    assert cross_entropy(labels[test], unseen, temperature) < cross_entropy(labels[test], unseen)
