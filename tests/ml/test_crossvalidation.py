"""Cross-validation: folds without the test scans, and what is made of their out-of-fold logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from ml.evaluation.calibration import Calibration, calibrate
from ml.evaluation.out_of_fold import OutOfFold, doubtful_labels, summary
from ml.image.engines.backends import engine_name
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.serving.gradcam import Explainer
from ml.image.serving.predictor import Predictor, ScanInput
from ml.image.stages import crossvalidation, runner, training
from ml.image.stages.crossvalidation import folds_of, take_mean_head
from ml.image.stages.run import Run
from ml.runtime.config import load_config, parse_params
from ml.runtime.errors import BadDataset, BadParams
from ml.runtime.events import Evaluated, Event
from tests.ml.builders import encode, last_linear, make_files, make_pixels, write_zip
from tests.ml.conftest import SIDE, SMALL, write_config

CLASSES = ("Normal", "Tumor")
FOLDED = SMALL | {"network": "resnet18", "head": "gap", "augmentation": False, "folds": 3, "ensemble": "folds"}
SWAPPED = ("Normal/Tumor-wrong.png", "Tumor/Normal-wrong.png")


def logit(probability: float) -> list[float]:
    """Logits that give the second class this probability."""
    return [0.0, float(np.log(probability / (1 - probability)))]


# --- out-of-fold logits ----------------------------------------------------------------------------------------------


def test_what_the_folds_tested_is_put_in_the_order_of_the_scans_and_can_be_stored():
    tested = [np.array([2, 7]), np.array([1, 4, 9])]
    found = OutOfFold.of_folds(tested, [np.array([[2.0, 0], [7, 0]]), np.array([[1.0, 0], [4, 0], [9, 0]])], [{}, {}])
    stored = OutOfFold.from_dict(json.loads(json.dumps(found.as_dict())))
    for one in (found, stored):
        assert one.scans.tolist() == [1, 2, 4, 7, 9]
        assert one.logits[:, 0].tolist() == [1, 2, 4, 7, 9]
        assert one.fold.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("probabilities", "labels", "temperature", "expected"),
    [
        # the probability of Tumor; the worst first, and only those that are taken for the other class
        ([0.9, 0.2, 0.99, 0.4], [0, 1, 0, 0], 1.0, [(12, 0.01), (10, 0.1), (11, 0.2)]),
        # sqrt(0.2) : sqrt(0.8) is 1 : 2 at temperature 2
        ([0.2, 0.1], [1, 0], 2.0, [(10, 1 / 3)]),
        ([0.9, 0.1], [1, 0], 1.0, []),
    ],
)
def test_labels_that_an_unbiased_network_contradicts_are_listed(probabilities, labels, temperature, expected):
    count = len(labels)
    logits = np.array([logit(one) for one in probabilities])
    found = OutOfFold(np.arange(10, 10 + count), logits, np.zeros(count, np.int64), [])
    doubtful = doubtful_labels(found, np.array(labels), CLASSES, temperature)
    assert [(one.scan, pytest.approx(one.probability, abs=1e-6)) for one in doubtful] == expected
    assert all(one.loss == pytest.approx(-np.log(one.probability), abs=1e-3) for one in doubtful)
    assert all({one.label, one.predicted} == set(CLASSES) for one in doubtful)


def test_figures_of_all_folds_are_pooled_under_the_models_own_threshold_and_by_patient():
    random = np.random.default_rng(0)
    labels = np.arange(120) % 2
    probability = np.clip(0.3 + 0.3 * labels + random.normal(0, 0.2, 120), 0.01, 0.99)
    logits = np.array([logit(one) for one in probability])
    figures = [dict.fromkeys(("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc", "loss"), 0.5)] * 2
    found = OutOfFold(np.arange(120), logits, np.repeat([0, 1], 60), figures)
    told = summary(found, labels, np.arange(120) // 8 * 2 + labels, CLASSES, Calibration(1.0, 0.37), seed=0)
    pooled, decided = told["pooled"], probability >= 0.37
    assert pooled["f1"] == pytest.approx(f1_score(labels, decided))
    assert pooled["recall"] == pytest.approx(recall_score(labels, decided))
    assert (pooled["held_out"], pooled["independent"]) == (120, 30)
    low, high = pooled["intervals"]["f1"]
    assert low < pooled["f1"] < high
    assert told["mean"]["f1"] == 0.5


# --- the ensemble ----------------------------------------------------------------------------------------------------


def test_the_ensembles_logits_are_the_mean_of_its_heads_logits():
    net = network.build(2, 0, "resnet18", "gap").eval()
    model, inputs = Model(net, CLASSES, None, {}, "resnet18", "gap"), np.random.default_rng(0).normal(size=(5, 512))
    random = np.random.default_rng(1)
    pairs = [(random.normal(size=(2, 512)), random.normal(size=2)) for _ in range(3)]
    heads = [{"1.weight": _tensor(weight), "1.bias": _tensor(bias)} for weight, bias in pairs]
    take_mean_head(model, heads)
    expected = np.mean([inputs @ weight.T + bias for weight, bias in pairs], axis=0)
    np.testing.assert_allclose(last_linear(model)(_tensor(inputs)).detach().numpy(), expected, atol=1e-4)


def _tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values).float()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"folds": 0}, "ensemble: there are no folds"),
        ({"head": "vgg", "network": "vgg16"}, "set head: gap"),
        ({"fine_tune_epochs": 1}, "set fine_tune_epochs: 0"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused_with_the_remedy(fields, named):
    with pytest.raises(BadParams, match=named):
        parse_params(FOLDED | fields)


# --- a training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """A finished run with folds, whose heads are its ensemble."""

    run: Run
    model: Path
    events: list[Event]
    artifacts: dict[str, str]
    heads: list[Any]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Folded:
    """40 scans, and two of the wrong class."""
    folder, heads, events = tmp_path_factory.mktemp("folded"), list[Any](), list[Event]()
    files = make_files(20, side=SIDE)
    files |= {SWAPPED[0]: encode(make_pixels(901, SIDE, SIDE, True)), SWAPPED[1]: encode(make_pixels(902, SIDE, SIDE))}
    config = load_config(write_config(folder, write_zip(files, folder / "data.zip")))

    def kept(model: Model, given: list[Any]) -> None:
        heads.extend(given)
        take_mean_head(model, given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "take_mean_head", kept)
        finished = runner.run_all(config, parse_params(FOLDED | {"epochs": 8}), events.append)
    run = Run(config, parse_params(FOLDED), lambda event: None)
    return Folded(run, Path(finished.model_path), events, dict(finished.artifacts), heads)


def test_folds_test_every_scan_but_those_of_the_test(folded):
    tested = np.concatenate([split.test for split in folds_of(folded.run)])
    split = folded.run.split
    assert sorted(tested.tolist()) == sorted([*split.train.tolist(), *split.validation.tolist()])
    for fold in folds_of(folded.run):
        assert not {*fold.train.tolist(), *fold.validation.tolist()} & {*split.test.tolist()}


def test_temperature_and_threshold_are_chosen_on_the_out_of_fold_logits_and_evaluated_so(folded):
    stored = OutOfFold.from_dict(json.loads(Path(folded.artifacts["out_of_fold.json"]).read_text()))
    expected = calibrate(folded.run.report.labels[stored.scans], stored.logits, [1])
    ours = Calibration.from_metadata(network.read_metadata(folded.model))
    assert (ours.temperature, ours.threshold) == (pytest.approx(expected.temperature), expected.threshold)
    assert "out-of-fold scans" in ours.reason
    scores = next(event.metrics for event in folded.events if isinstance(event, Evaluated))
    assert (scores["temperature"], scores["threshold"]) == (ours.temperature, ours.threshold)
    assert scores["calibration"] == ours.reason
    assert scores["cross_validation"]["pooled"]["held_out"] == len(stored.scans)


def test_wrong_labels_are_on_the_owners_list_and_in_the_report_without_a_name(folded):
    listed = json.loads(Path(folded.artifacts["doubtful_labels.json"]).read_text())
    tested = {folded.run.report.scans[scan].path for fold in folds_of(folded.run) for scan in fold.test}
    assert {*SWAPPED} & tested
    assert {*SWAPPED} & tested <= {one["path"] for one in listed[:3]}
    page = Path(folded.artifacts["report.html"]).read_text()
    assert "Scan in the manifest" in page
    assert "-wrong" not in page


def test_an_ensemble_is_one_plain_network_with_all_engines_and_explanations(folded):
    model = network.load(folded.model)
    assert len(folded.heads) == 3
    for name, value in last_linear(model).state_dict().items():
        mean = np.mean([head[f"1.{name}"].numpy() for head in folded.heads], axis=0)
        np.testing.assert_allclose(value.numpy(), mean, atol=1e-6)
    assert set(model.metadata["engines"]) == {engine_name(form) for form in supported_dtypes()}
    scan = ScanInput("a", encode(make_pixels(1, SIDE, SIDE, True)))
    (predicted,) = Predictor.load(folded.model).predict([scan])
    (explained,) = Explainer.load(folded.model).explain([scan])
    assert predicted.error_code is None
    assert explained.overlay is not None


def test_an_evaluation_alone_reads_what_the_training_wrote_or_says_what_to_run(folded, tmp_path, monkeypatch):
    found = crossvalidation.OutOfFold.from_dict(json.loads(folded.run.config.training.out_of_fold_path.read_text()))
    from ml.image.stages import evaluation

    assert evaluation._out_of_fold(folded.run).scans.tolist() == found.scans.tolist()
    moved = folded.run.config.training.model_copy(update={"root_dir": tmp_path})
    other = Run(folded.run.config.model_copy(update={"training": moved}), folded.run.params, lambda event: None)
    with pytest.raises(BadParams, match="run the stage training again"):
        evaluation._out_of_fold(other)


def test_too_many_folds_are_refused_before_anything_is_trained(folded, monkeypatch):
    def trained(*_: object) -> None:
        raise AssertionError("nothing was to be trained")

    monkeypatch.setattr(training, "_train", trained)
    run = Run(folded.run.config, parse_params(FOLDED | {"folds": 20}), lambda event: None, in_one_process=True)
    run.model = network.load(folded.model)
    with pytest.raises(BadDataset, match="folds: 20 is more than the"):
        training.training(run)
