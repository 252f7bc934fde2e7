"""Admission: dtypes with nearly the same outputs as fp32 are admitted, and the fastest one is chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ml.evaluation.calibration import Calibration
from ml.image.engines import admission, backends
from ml.image.engines.admission import Admission, admit, choose_dtype, choose_float_dtype, most_telling
from ml.image.engines.backends import engine_name
from ml.image.engines.graphs import graph_of
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor
from ml.image.stages import training
from ml.image.stages.run import Run
from ml.runtime.config import load_config, parse_params
from ml.runtime.errors import EngineNotAdmitted
from tests.ml.builders import make_pixels, make_scans
from tests.ml.conftest import SMALL

REFERENCE = np.array([[2.0, -2.0], [1.0, -1.0], [-1.0, 1.0], [-2.0, 2.0]], np.float32)
LABELS = np.array([0, 0, 1, 1])


def trial(form: str, logits: np.ndarray) -> admission.Trial:
    return admission.ReferenceComparison(Calibration(threshold=0.5), LABELS, [1], REFERENCE).trial(form, logits)


def moved(row: int, by: float) -> np.ndarray:
    logits = REFERENCE.copy()
    logits[row, 1] += by
    return logits


def metadata(**admitted: bool) -> dict[str, object]:
    trials = {form: {"admitted": fine, "reason": "F1 fell by 0.2"} for form, fine in admitted.items()}
    return {"engines": {engine_name(form): trial for form, trial in trials.items()}}


# --- what is little enough -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_equal_logits_are_admitted(form):
    found = trial(form, REFERENCE)
    assert found.admitted
    assert (found.labels_changed, found.largest_difference, found.scans) == (0, 0.0, 4)


def test_a_probability_that_moved_too_far_is_refused_by_bf16_and_taken_by_int8():
    assert not trial("bf16", moved(1, 0.3)).admitted
    assert "moved by 0.0" in trial("bf16", moved(1, 0.3)).reason
    assert trial("int8", moved(1, 0.3)).admitted


def test_int8_is_refused_where_a_probability_moves_by_more_than_a_twentieth():
    found = trial("int8", moved(1, 1.0))
    assert not found.admitted
    assert "more than 0.05" in found.reason


def test_a_label_that_changes_is_refused_even_where_the_probability_hardly_moved(monkeypatch):
    near = np.array([[2.0, -2.0], [0.001, 0.0], [-1.0, 1.0], [-2.0, 2.0]], np.float32)
    judge = admission.ReferenceComparison(Calibration(threshold=0.5), LABELS, [1], near)
    other = near.copy()
    other[1, 1] = 0.002
    assert judge.trial("bf16", other).reason == "1 labels changed"
    assert judge.trial("int8", other).reason.startswith("F1 fell by 0.2")


def test_int8_may_change_a_label_for_the_better():
    wrong = np.array([[2.0, -2.0], [0.0, 0.001], [-1.0, 1.0], [-2.0, 2.0]], np.float32)
    judge = admission.ReferenceComparison(Calibration(threshold=0.5), LABELS, [1], wrong)
    right = wrong.copy()
    right[1, 0] = 0.002
    found = judge.trial("int8", right)
    assert found.admitted
    assert found.labels_changed == 1


def test_logits_that_are_not_finite_are_refused():
    assert trial("int8", np.full_like(REFERENCE, np.nan)).reason == "its answers are not finite"


# --- on which scans --------------------------------------------------------------------------------------------------


def logit_of(*probabilities: float) -> np.ndarray:
    """Logits [n, 2] that give the second class these probabilities."""
    return np.array([[0.0, np.log(p / (1 - p))] for p in probabilities])


@pytest.mark.parametrize(
    ("logits", "threshold", "positive", "chosen"),
    [
        # four nearest to 0.5 (1, 4, 6, 11), and of the other eight every second or third from first to last
        (logit_of(.9, .5, .1, .8, .45, .2, .6, .95, .05, .7, .99, .42), 0.5, [1], [0, 1, 3, 4, 6, 7, 10, 11]),
        # nearest to another threshold: 3, 0, 7, 9
        (logit_of(.9, .5, .1, .8, .45, .2, .6, .95, .05, .7, .99, .42), 0.8, [1], [0, 1, 3, 4, 6, 7, 9, 11]),
        # of few, all
        (logit_of(.9, .1, .5), 0.5, [1], [0, 1, 2]),
        # of several classes: where the first and the second are near to each other (8 to 11)
        (np.array([[3.0, 0, 0]] * 8 + [[1.0, 0.9, 0]] * 4), None, [], [0, 2, 4, 7, 8, 9, 10, 11]),
    ],
)  # fmt: skip
def test_half_of_the_scans_tried_are_those_that_rounding_may_decide_otherwise(logits, threshold, positive, chosen):
    assert most_telling(logits, Calibration(threshold=threshold), positive).tolist() == chosen


# --- which one is taken ----------------------------------------------------------------------------------------------


def test_the_fastest_admitted_dtype_is_chosen():
    assert choose_dtype(metadata(int8=True, bf16=True, fp32=True)) == supported_dtypes()[0]
    assert choose_dtype(metadata(int8=False, bf16=False, fp32=True)) == "fp32"


def test_an_untried_dtype_is_not_chosen():
    assert choose_dtype({"engines": {}}) == "fp32"


def test_a_file_without_trials_predicts_as_it_was_trained_and_never_in_int8():
    assert choose_dtype({"precision": "fp32"}) == "fp32"
    assert choose_dtype({}) == next(form for form in supported_dtypes() if form != "int8")


def test_requesting_a_refused_dtype_raises_with_the_reason():
    for form in supported_dtypes()[:-1]:
        with pytest.raises(EngineNotAdmitted, match=r"F1 fell by 0\.2"):
            choose_dtype(metadata(**{form: False}), form)
        assert choose_dtype(metadata(**{form: True}), form) == form


def test_requesting_an_unsupported_dtype_raises(monkeypatch):
    monkeypatch.setattr(admission, "supported_dtypes", lambda: ("fp32",))
    with pytest.raises(EngineNotAdmitted, match="does not compute int8 in hardware; use auto or fp32"):
        choose_dtype(metadata(int8=True), "int8")
    assert choose_dtype(metadata(), "fp32") == "fp32"


def test_parts_of_a_network_never_run_in_int8(monkeypatch):
    monkeypatch.setattr(admission, "supported_dtypes", lambda: ("int8", "bf16", "fp32"))
    told = [choose_float_dtype(metadata(int8=True, bf16=bf16)) for bf16 in (True, False)]
    assert told == ["bf16", "fp32"]
    assert choose_float_dtype(metadata(int8=True, bf16=True), "int8") == "bf16"
    assert choose_float_dtype(metadata(int8=True, bf16=True), "fp32") == "fp32"
    assert choose_float_dtype(metadata(int8=False, bf16=True)) == "bf16"
    assert choose_float_dtype({}) == "bf16", "an earlier version's file predicts so too"
    monkeypatch.setattr(admission, "supported_dtypes", lambda: ("int8", "fp32"))
    assert choose_float_dtype(metadata(int8=True, bf16=True)) == "fp32", "where this machine has no bf16"


# --- with a network --------------------------------------------------------------------------------------------------


def test_a_model_file_contains_its_trials(small_run):
    told = network.read_metadata(small_run.model_path)
    assert set(told["engines"]) == {engine_name(form) for form in supported_dtypes()}
    assert told["engines"][engine_name("fp32")]["admitted"]
    scores = json.loads((small_run.folder / "evaluation" / "scores.json").read_text())
    assert scores["engines"] == told["engines"]
    assert Predictor.load(small_run.model_path).engine.name == engine_name(choose_dtype(told))


def test_each_supported_dtype_is_admitted_for_a_real_network(small_run):
    model = network.load(small_run.model_path)
    pictures = np.stack([make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(10)])
    found = admit(model, Calibration(threshold=0.5), pictures, np.arange(10) % 2, make_scans(8, 64))
    assert isinstance(found, Admission)
    assert [found.trials[engine_name(form)].admitted for form in supported_dtypes()] == [True] * len(
        supported_dtypes()
    ), found.trials


def test_engines_are_tried_on_validation_scans_and_never_on_test_scans(small_run, monkeypatch):
    run = Run(load_config(small_run.folder / "config.yaml"), parse_params(SMALL), lambda event: None)
    tried = []
    monkeypatch.setattr(training, "admit", lambda model, calibration, *scans: tried.append(scans))
    training._admit(run, network.load(small_run.model_path), Calibration(threshold=0.5), None, lambda fraction: None)
    ((pictures, labels, seen, *_),) = tried
    known = run.split.validation
    assert {each.tobytes() for each in pictures} <= {each.tobytes() for each in run.pixels[known]}
    assert len(pictures) == len(labels) == min(len(known), admission.TRIAL_SCANS)
    assert len(seen) == min(len(run.split.train), admission.RANGE_SCANS)


def test_a_network_is_traced_once_and_not_tried_in_int8_where_that_gains_nothing(monkeypatch):
    traced = list[object]()
    monkeypatch.setattr(backends, "graph_of", lambda *given: traced.append(given) or graph_of(*given))
    net = network.build(2, 0, "efficientnet_b0", "gap").eval()
    model = network.Model(net, ("a", "b"), Transform(64, 64), {}, "efficientnet_b0", "gap")
    found = admit(model, Calibration(threshold=0.5), make_scans(3, 64), np.arange(3) % 2, make_scans(3, 64))
    assert len(traced) <= 1
    assert set(found.trials) == {engine_name(form) for form in supported_dtypes()}
    assert found.ranges is None
    if "int8" in supported_dtypes():
        assert found.trials[engine_name("int8")] == admission.NO_GAIN
        with pytest.raises(EngineNotAdmitted, match="it is no faster than bf16 for this network"):
            choose_dtype(found.as_dict(), "int8")


def test_a_dtype_is_tried_on_few_scans(small_run):
    model = network.load(small_run.model_path)
    tried = {trial["scans"] for trial in model.metadata["engines"].values()}
    run = Run(load_config(small_run.folder / "config.yaml"), parse_params(SMALL), lambda event: None)
    assert tried == {min(admission.TRIAL_SCANS, len(run.split.validation))}
