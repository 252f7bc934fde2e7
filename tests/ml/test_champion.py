"""The comparison with the champion: on which scans, by which predictions, and when it is impossible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ml.__main__ import main
from ml.image.dataset.lineage import lineage
from ml.image.engines.features import Features
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor, ScanInput
from ml.image.stages import champion
from ml.image.stages.champion import Comparison
from ml.image.stages.evaluation import _model_outputs
from ml.image.stages.run import Run, RunEnvironment
from ml.runtime.config import load_config, parse_params
from tests.ml.conftest import SIDE, SMALL, SmallRun

CLASSES = ("Normal", "Tumor")
MANY = {"test_size": 0.5}
"""A split with twenty test scans of the small run's forty."""


@pytest.fixture(scope="module")
def candidate(small_run: SmallRun) -> Model:
    """The network of the small run."""
    return network.load(small_run.model_path)


@pytest.fixture(scope="module")
def features() -> dict[int, Features]:
    """The candidate's features, computed by the first run that needs them."""
    return {}


@pytest.fixture
def run(small_run: SmallRun, features: dict[int, Features]) -> Run:
    """A run in the folder of the small run, with its scans."""
    config, params = load_config(small_run.folder / "config.yaml"), parse_params(SMALL | MANY)
    return Run(config, params, lambda event: None, features_by_top=features)


def rival(side: int = SIDE, classes: tuple[str, ...] = CLASSES, **metadata: Any) -> Model:
    """Another network with random weights and an empty lineage."""
    made = network.build(len(classes), 0, "resnet18", "gap").eval()
    told = {"lineage": [], "calibration": {"temperature": 1.5, "threshold": 0.4}, **metadata}
    return Model(made, classes, Transform(side, side), told, "resnet18", "gap")


def beside(run: Run, candidate: Model, path: Path | None, told: list[float] | None = None) -> Comparison | None:
    """Compare the run's candidate with the champion in a file."""
    run.environment = RunEnvironment(champion=path)
    outputs = _model_outputs(run, candidate)
    tell = (lambda fraction: None) if told is None else told.append
    return champion.compare_with_champion(run, candidate, outputs, tell)


def saved(model: Model, folder: Path) -> Path:
    """Save a model file."""
    network.save(model, folder / "champion.safetensors")
    return folder / "champion.safetensors"


def test_without_a_champion_there_is_nothing_to_compare(run: Run, candidate: Model) -> None:
    assert beside(run, candidate, None) is None


def test_both_are_scored_on_the_same_scans(run: Run, candidate: Model, tmp_path: Path) -> None:
    told: list[float] = []
    found = beside(run, candidate, saved(rival(), tmp_path), told)
    assert found is not None
    assert (found.comparable, found.scans, found.why) == (True, 20, "")
    assert found.test_digest == run.report.digest_of(run.split.test)
    assert found.champion is not None
    assert found.candidate is not None
    assert found.candidate["held_out"] == found.champion["held_out"] == 20
    assert (found.champion["temperature"], found.champion["threshold"]) == (1.5, 0.4), "its own"
    assert found.paired is not None
    assert found.paired["groups"] == len(np.unique(_model_outputs(run, candidate).groups))
    f1 = found.paired["differences"]["f1"]
    ours, theirs = (each["by_patient"]["f1"] for each in (found.candidate, found.champion))
    assert f1["difference"] == pytest.approx(ours - theirs), "by patient"
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_network_is_as_good_as_itself(small_run: SmallRun, run: Run, candidate: Model) -> None:
    run.params = parse_params(SMALL)  # the split that it was trained with
    found = beside(run, candidate, small_run.model_path)
    assert found is not None
    assert found.champion is not None
    assert found.candidate is not None
    assert found.scans == 8, "nothing was learnt from: then few scans are as good as they are"
    assert found.champion == found.candidate


def test_the_champion_is_scored_at_the_threshold_that_was_set_anew(run: Run, candidate: Model, tmp_path: Path) -> None:
    path, threshold = saved(rival(), tmp_path), 0.001
    run.environment = RunEnvironment(champion=path, champion_threshold=threshold)
    found = champion.compare_with_champion(run, candidate, _model_outputs(run, candidate), lambda fraction: None)
    assert found is not None
    assert found.champion is not None
    assert (found.champion["threshold"], found.champion["temperature"]) == (threshold, 1.5)
    assert (found.champion["recall"], found.champion["specificity"]) == (1.0, 0.0), "all are called Tumor"


def test_a_champion_with_another_positive_class_is_scored_on_the_candidates_finding(
    run: Run, candidate: Model, tmp_path: Path
) -> None:
    """It calls nearly everything Normal, its positive class, and is told how many tumours it misses by that."""
    low = {"calibration": {"temperature": 1.0, "threshold": 1e-9}, "positive": ["Normal"]}
    found = beside(run, candidate, saved(rival(**low), tmp_path))
    assert found is not None
    assert found.champion is not None
    assert (found.champion["positive"], found.champion["recall"]) == (["Tumor"], 0.0)
    assert found.champion["specificity"] == 1.0


@pytest.mark.parametrize("side", [SIDE, 96])
def test_the_champion_is_scored_by_its_predictions(run: Run, candidate: Model, tmp_path: Path, side: int) -> None:
    path = saved(rival(side), tmp_path)
    found = beside(run, candidate, path)
    assert found is not None
    assert found.champion is not None
    folder = run.config.data_ingestion.scans_dir
    files = [folder / run.report.scans[scan].path for scan in run.split.test]
    predicted = [each.label for each in Predictor.load(path).predict(ScanInput(file.name, file) for file in files)]
    matrix = np.zeros((2, 2), int)
    for scan, label in zip(run.split.test, predicted, strict=True):
        matrix[run.report.labels[scan], CLASSES.index(str(label))] += 1
    assert found.champion["confusion_matrix"] == matrix.tolist()


def test_scans_are_unpacked_for_another_transform_where_their_pixels_came_out_of_the_cache(
    run: Run, candidate: Model, tmp_path: Path
) -> None:
    section = run.config.data_ingestion.model_copy(update={"unzip_dir": tmp_path / "images"})
    run.config = run.config.model_copy(update={"data_ingestion": section})
    found = beside(run, candidate, saved(rival(96), tmp_path))
    assert found is not None
    assert found.comparable
    assert (tmp_path / "images").is_dir()


def test_the_command_prints_both_scores(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((small_run.folder / "config.yaml").read_text())
    config["evaluation"] = {"root_dir": str(tmp_path), "scores_path": str(tmp_path / "scores.json")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(SMALL | MANY))
    files = ["--config", str(tmp_path / "config.yaml"), "--params", str(tmp_path / "params.yaml")]
    assert main(["evaluation", *files, "--champion", str(saved(rival(), tmp_path))]) == 0
    assert "on 20 test scans that neither has learnt from" in capsys.readouterr().out


# --- what one of the two has learnt from ---


def learnt(run: Run, scans: int) -> tuple[str, ...]:
    """The lineage of a network that has learned from this many test scans of both classes."""
    return lineage(run.report, in_turns(run)[:scans])


def in_turns(run: Run) -> np.ndarray:
    """The test scans, those at even positions first."""
    return np.concatenate([run.split.test[::2], run.split.test[1::2]])


def test_scans_the_champion_learned_from_are_left_out(run: Run, candidate: Model, tmp_path: Path) -> None:
    found = beside(run, candidate, saved(rival(lineage=learnt(run, 8)), tmp_path))
    assert found is not None
    assert (found.comparable, found.scans) == (True, 12)
    assert found.test_digest == run.report.digest_of(in_turns(run)[8:])
    assert found.champion is not None
    assert found.candidate is not None
    assert found.candidate["held_out"] == found.champion["held_out"] == 12


def test_scans_the_initial_weights_learned_from_are_left_out(run: Run, candidate: Model, tmp_path: Path) -> None:
    begun = replace(candidate, metadata={**candidate.metadata, "begun_lineage": learnt(run, 5)})
    found = beside(run, begun, saved(rival(lineage=learnt(run, 8)), tmp_path))
    assert found is not None
    assert found.scans == 12, "they are among the champion's"


def test_too_few_scans_that_neither_has_learnt_from_are_no_comparison(
    run: Run, candidate: Model, tmp_path: Path
) -> None:
    found = beside(run, candidate, saved(rival(lineage=learnt(run, 11)), tmp_path))
    assert found is not None
    assert not found.comparable
    assert "of the 20 test scans one of the two has learnt from 11" in found.why
    assert "the others are too few: 4 Normal, 5 Tumor, where 10 scans with 3 of each class are needed" in found.why
    assert (found.champion, found.candidate, found.test_digest) == (None, None, None)


def test_scans_of_one_class_are_no_comparison(run: Run, candidate: Model, tmp_path: Path) -> None:
    tumours = [scan for scan in run.split.test if run.report.scans[scan].label == "Tumor"][2:]
    found = beside(run, candidate, saved(rival(lineage=lineage(run.report, tumours)), tmp_path))
    assert found is not None
    assert not found.comparable
    assert "10 Normal, 2 Tumor" in found.why


def test_a_champion_without_a_lineage_is_not_compared(run: Run, candidate: Model, tmp_path: Path) -> None:
    found = beside(run, candidate, saved(rival(lineage=None), tmp_path))
    assert found is not None
    assert (found.comparable, found.why) == (False, "its file does not tell what it has learnt from")


# --- a champion that is no match ---


def test_a_champion_of_other_classes_is_not_compared(run: Run, candidate: Model, tmp_path: Path) -> None:
    found = beside(run, candidate, saved(rival(classes=("Cyst", "Stone", "Tumor")), tmp_path))
    assert found is not None
    assert (found.comparable, found.why) == (False, "its classes are Cyst, Stone, Tumor, not Normal, Tumor")


@pytest.mark.parametrize("content", [None, b"", b"no network at all", b"\x10" + b"\0" * 7 + b'{"a": 1}        '])
def test_a_file_that_cannot_be_read_does_not_fail_the_training(
    run: Run, candidate: Model, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "champion.safetensors"
    if content is not None:
        path.write_bytes(content)
    found = beside(run, candidate, path)
    assert found is not None
    assert (found.comparable, found.why) == (False, "its file cannot be read")


def test_an_unexpected_error_does_not_fail_the_training(run: Run, candidate: Model, tmp_path: Path) -> None:
    found = beside(run, candidate, saved(rival(lineage=["no token"]), tmp_path))
    assert found is not None
    assert not found.comparable
    assert found.why.startswith("it could not be scored")
