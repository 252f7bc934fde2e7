"""The four stages, together and alone, and the child process that the worker starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ml.image.dataset.scans import load_manifest
from ml.image.networks import network, weights
from ml.image.serving.predictor import Predictor, ScanInput
from ml.image.stages import runner
from ml.image.stages.run import Run, RunEnvironment
from ml.runtime.config import load_config, parse_params
from ml.runtime.errors import BadDataset, BadParams, DownloadFailed, WeightsMissing
from ml.runtime.events import (
    Epoch,
    Evaluated,
    Event,
    Failed,
    Finished,
    StageFinished,
    StageStarted,
    Steps,
    from_json,
)
from ml.spec.image import NETWORKS
from ml.spec.image_pipeline import STAGES
from tests.depth import rest_in_full
from tests.ml.builders import make_files, write_folder, write_zip
from tests.ml.conftest import SIDE, SMALL, write_config


def write_params(folder: Path, **fields: object) -> Path:
    (folder / "params.yaml").write_text(yaml.safe_dump({**SMALL, **fields}))
    return folder / "params.yaml"


def start(folder: Path, stage: str = "train", **fields: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ml", stage, "--events", "--config", str(folder / "config.yaml")]
    params = write_params(folder, **fields)
    return subprocess.Popen(
        [*command, "--params", str(params)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_a_run_emits_stages_epochs_scores_and_its_end_in_order(small_run):
    kinds = [event for event in small_run.events if isinstance(event, (StageStarted, StageFinished))]
    assert [event.stage for event in kinds] == [stage for stage in STAGES for _ in range(2)]
    assert [event.epoch for event in small_run.events if isinstance(event, Epoch)] == [1, 2, 3]
    assert isinstance(small_run.events[-1], Finished)


def test_a_run_leaves_a_model_scores_and_plots(small_run):
    finished = small_run.events[-1]
    model = network.load(Path(finished.model_path))
    assert model.classes == ("Normal", "Tumor")
    assert model.metadata["params"]["learning_rate"] == 0.01
    assert model.metadata["engine"]
    assert model.metadata["origins"] == [{"modality": None, "body_part": None, "kind": "colour"}], "RGB in PNG"
    assert set(finished.artifacts) >= {"scores.json", "confusion_matrix.png", "learning_curves.png", "history.json"}
    for name, path in finished.artifacts.items():
        if name.endswith(".png"):
            with Image.open(path) as picture:
                assert picture.width > 300
    assert finished.device_seconds > 0


def test_the_scores_are_those_of_scans_that_training_never_saw(small_run):
    scores = next(event.metrics for event in small_run.events if isinstance(event, Evaluated))
    assert scores == json.loads((small_run.folder / "evaluation" / "scores.json").read_text())
    assert scores["counts"] == {"train": 28, "validation": 4, "test": 8}
    assert scores["held_out"] == 8
    assert scores["leaks"] == {"patients": 0, "duplicates": 0, "near_duplicates": 0, "studies": 0}
    assert len(scores["test_digest"]) == 64
    assert scores["accuracy"] >= 0.85, "the pictures can be told apart"


def test_steps_are_reported_once_with_their_losses(small_run):
    steps = [event for event in small_run.events if isinstance(event, Steps)]
    assert steps[0].first_step == 1
    assert sum(len(event.losses) for event in steps) == 3 * 4, "three epochs of four batches"
    for one, following in pairwise(steps):
        assert following.first_step == one.first_step + len(one.losses)


def test_the_dataset_report_has_findings_and_no_file_names(small_run):
    artifacts = small_run.events[-1].artifacts
    page = Path(artifacts["report.html"]).read_text()
    scores = json.loads(Path(artifacts["scores.json"]).read_text())
    assert f"{scores['f1']:.2f}" in page
    assert "vgg16" in page
    assert "Normal-0" not in page, "a file's name may be a patient's"
    assert Path(artifacts["report.pdf"]).read_bytes().startswith(b"%PDF")
    assert "inspection" in json.loads(Path(artifacts["dataset_report.json"]).read_text())


def test_nothing_temporary_stays_behind(small_run):
    assert not [path for path in small_run.folder.rglob("*") if "partial" in path.name or path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.scaled
def test_stages_alone_give_what_a_run_gives(small_run, tmp_path):
    config = load_config(write_config(tmp_path, small_run.archive))
    events = []
    for stage in STAGES:
        # Who reruns the training alone (as dvc does) may have changed parameters of it since the stage before.
        fields = SMALL | {"augmentation": False, "patience": 0 if stage in STAGES[:2] else 9}
        runner.run_stage(stage, Run(config, parse_params(fields), events.append))
    assert network.read_metadata(config.training.trained_model_path)["params"]["patience"] == 9
    ours = next(event.metrics for event in events if isinstance(event, Evaluated))
    theirs = next(event.metrics for event in small_run.events if isinstance(event, Evaluated))
    assert ours["confusion_matrix"] == theirs["confusion_matrix"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05, abs=1e-3)
    assert config.prepare_base_model.base_model_path.exists()
    assert network.read_metadata(config.prepare_base_model.updated_base_model_path)["classes"] == ["Normal", "Tumor"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_without_its_input_says_which_stage_to_run(tmp_path, stage):
    run = Run(load_config(write_config(tmp_path)), parse_params(SMALL), lambda event: None)
    with pytest.raises(BadDataset, match="run the stage data_ingestion first"):
        runner.run_stage(stage, run)


def ingest(folder: Path, archive: Path | None = None, source_url: str | None = None, **fields: object) -> None:
    config = load_config(write_config(folder, archive, source_url))
    runner.data_ingestion(Run(config, parse_params({**SMALL, **fields}), lambda event: None))


def test_a_bad_dataset_is_refused_with_its_reasons_and_no_pixels_stay(tmp_path):
    archive = write_zip({**make_files(6), "Normal/torn.png": b"x"}, tmp_path / "data.zip")
    with pytest.raises(BadDataset, match=r"Normal/torn\.png"):
        ingest(tmp_path, archive)
    assert not list((tmp_path / "data").glob("*.npy*"))


def test_an_empty_zip_is_a_bad_dataset(tmp_path):
    with pytest.raises(BadDataset, match="holds no images"):
        ingest(tmp_path, write_zip({}, tmp_path / "data.zip"))


def test_the_number_of_classes_must_be_the_one_asked_for(tmp_path):
    with pytest.raises(BadDataset, match="classes is 4"):
        ingest(tmp_path, write_zip(make_files(6), tmp_path / "data.zip"), classes=4)


def test_a_folder_is_read_where_it_lies_and_is_the_same_dataset_as_its_zip(tmp_path):
    files = make_files(6)
    ingest(tmp_path / "one", write_zip(files, tmp_path / "data.zip"))
    ingest(tmp_path / "two", write_folder(files, tmp_path / "scans"))
    one, two = (load_manifest(tmp_path / name / "data" / "manifest.json") for name in ("one", "two"))
    assert (one.digest, one.scans) == (two.digest, two.scans)
    assert (tmp_path / "one/data/pixels.npy").read_bytes() == (tmp_path / "two/data/pixels.npy").read_bytes()
    assert not (tmp_path / "two/data/images").exists()


def test_a_folder_of_scans_that_would_be_written_into_is_refused(tmp_path):
    with pytest.raises(BadParams, match=r"lies in the folder of the scans.*--out"):
        ingest(tmp_path / "scans" / "out", write_folder(make_files(6), tmp_path / "scans"))


def test_no_file_and_no_source_is_an_error_of_the_config(tmp_path):
    with pytest.raises(BadParams, match="source_URL"):
        ingest(tmp_path)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DownloadFailed, match="cannot be reached"):
        ingest(tmp_path, source_url="http://127.0.0.1:9/data.zip")


def test_without_imagenet_weights_the_stage_says_what_to_put_where(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SITE", "http://127.0.0.1:9/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    config = load_config(write_config(tmp_path, small_run.archive))
    environment = RunEnvironment(weights_dir=tmp_path / "weights")
    run = Run(config, parse_params({**SMALL, "weights": "imagenet"}), lambda event: None, environment)
    runner.data_ingestion(run)
    with pytest.raises(WeightsMissing, match=r"vgg16-397923af\.pth"):
        runner.prepare_base_model(run)


def test_another_image_size_than_the_ingested_is_named(small_run):
    config = load_config(small_run.folder / "config.yaml")
    run = Run(config, parse_params({**SMALL, "image_size": [96, 96, 3]}), lambda event: None)
    with pytest.raises(BadParams, match="image_size"):
        _ = run.pixels


# --- the other ways through ------------------------------------------------------------------------------------------


def run_of(folder: Path, archive: Path, environment: RunEnvironment | None = None, **fields: object) -> list[Event]:
    """The events of a complete run in this process."""
    events: list[Event] = []
    params = parse_params({**SMALL, "augmentation": False, "epochs": 2, **fields})
    runner.run_all(load_config(write_config(folder, archive)), params, events.append, environment)
    return events


def scores_of(events: list[Event]) -> dict[str, object]:
    return next(event.metrics for event in events if isinstance(event, Evaluated))


@pytest.mark.slow
@pytest.mark.parametrize("name", rest_in_full(NETWORKS, lambda name: name == "resnet18"))
def test_every_network_trains_and_predicts(small_run, tmp_path, name):
    size = {"vit_b_16": 224, "inception_v3": 96}.get(name, SIDE)
    events = run_of(tmp_path, small_run.archive, network=name, head="auto", image_size=[size, size, 3])
    model_path = Path(events[-1].model_path)
    assert network.read_metadata(model_path)["architecture"] == name
    assert scores_of(events)["accuracy"] > 0.5
    scans = [ScanInput(path, content) for path, content in make_files(3, side=SIDE).items()]
    found = list(Predictor.load(model_path).predict(scans))
    assert sum(one.id.startswith(one.label) for one in found) >= 4


@pytest.mark.slow
def test_four_classes_with_a_small_head_folds_and_blocks_that_learn(tmp_path):
    archive = write_zip(make_files(12, ("Cyst", "Normal", "Stone", "Tumor"), SIDE), tmp_path / "data.zip")
    fields = {"network": "resnet18", "fine_tune_epochs": 1, "folds": 2, "balance": "weights", "optimizer": "adamw"}
    events = run_of(tmp_path, archive, **fields, learning_rate=0.001)
    scores = scores_of(events)
    assert [event.phase for event in events if isinstance(event, Epoch)] == ["head", "head", "fine_tune"]
    assert (scores["classes"], scores["positive"]) == (["Cyst", "Normal", "Stone", "Tumor"], [])
    assert sum(fold["test"] for fold in scores["cross_validation"]["folds"]) == 48 - scores["counts"]["test"]
    assert "cross_validation.png" in events[-1].artifacts


@pytest.mark.slow
@pytest.mark.scaled
def test_a_second_training_of_the_same_scans_decodes_and_computes_nothing_again(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ml.image.stages.ingestion.check_dataset", refused)
    monkeypatch.setattr("ml.image.engines.features.Features._stream", refused)
    again = run_of(tmp_path, small_run.archive, small_run.environment, epochs=SMALL["epochs"])
    assert scores_of(again) == scores_of(small_run.events)


def refused(*_: object, **__: object) -> None:
    raise AssertionError("this was to come out of the cache")


@pytest.mark.slow
@pytest.mark.scaled
def test_initial_weights_carry_their_lineage_and_leaks_are_counted(small_run, tmp_path):
    environment = RunEnvironment(base_weights=small_run.model_path)
    events = run_of(tmp_path, small_run.archive, environment, weights="version:1", seed=1)
    scores = scores_of(events)
    assert scores["leaks"]["duplicates"] > 0, "another seed tests scans that the former network has learned from"
    metadata = network.read_metadata(Path(events[-1].model_path))
    assert set(metadata["lineage"]) > set(network.read_metadata(small_run.model_path)["lineage"])


def test_weights_of_another_network_are_named(small_run, tmp_path):
    environment = RunEnvironment(base_weights=small_run.model_path)
    with pytest.raises(BadParams, match="weights: they are of vgg16, but network is resnet18"):
        run_of(tmp_path, small_run.archive, environment, weights="version:1", network="resnet18")


def test_an_equal_training_in_another_process_gives_the_same_bytes(small_run, tmp_path):
    write_config(tmp_path, small_run.archive)
    child = start(tmp_path, augmentation=False)
    output, _ = child.communicate(timeout=250)
    finished = from_json(output.splitlines()[-1])
    assert weights.sha256(Path(finished.model_path)) == weights.sha256(small_run.model_path)


# --- the child process -----------------------------------------------------------------------------------------------


def test_a_child_that_fails_says_why_and_exits_with_1(tmp_path):
    write_config(tmp_path, write_zip(make_files(6, classes=("Normal",)), tmp_path / "data.zip"))
    child = start(tmp_path)
    output, _ = child.communicate(timeout=60)
    failed = from_json(output.splitlines()[-1])
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable, child.returncode) == ("BAD_DATASET", False, 1)


def test_a_child_with_a_wrong_parameter_names_it(tmp_path):
    write_config(tmp_path)
    output, _ = start(tmp_path, epochs=-1).communicate(timeout=60)
    assert from_json(output.splitlines()[-1]) == Failed(
        "BAD_PARAMS", "epochs: Input should be greater than or equal to 1.", False
    )  # fmt: skip


@pytest.mark.slow
def test_sigterm_ends_a_training_at_once_and_leaves_no_half_written_file(small_run, tmp_path):
    write_config(tmp_path, small_run.archive)
    child = start(tmp_path, epochs=1000)
    assert child.stdout is not None
    for line in child.stdout:
        if isinstance(from_json(line), Epoch):
            break
    started = time.monotonic()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 143
    assert time.monotonic() - started < 5
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert not (tmp_path / "training" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_finding_and_the_point_of_a_training_are_those_of_its_model_file(tmp_path):
    archive = write_zip(make_files(20, ("Cancer", "Healthy"), SIDE), tmp_path / "data.zip")
    events = run_of(tmp_path, archive, network="resnet18", operate_at={"sensitivity": 0.9}, folds=2)
    scores, model = scores_of(events), network.load(Path(events[-1].model_path))
    assert scores["positive"] == list(model.positive) == ["Cancer"]
    point = model.metadata["operating_point"]
    assert scores["operating_point"] == point
    assert point["threshold"] == model.metadata["calibration"]["threshold"] == scores["threshold"]
    assert (point["rule"], point["wanted"]) == ("sensitivity", 0.9)
    assert "the highest with a sensitivity of 0.9" in Path(events[-1].artifacts["report.html"]).read_text()
    assert scores["calibration"] == model.metadata["calibration"]["reason"]
    kept = next(event.scan_scores for event in events if isinstance(event, Evaluated))
    assert (kept["positive"], len(kept["test"]["label"]), kept["classes"]) == (["Cancer"], 8, ["Cancer", "Healthy"])
    called = [score >= scores["threshold"] for score in kept["test"]["score"]]
    found = sum(call for call, label in zip(called, kept["test"]["label"], strict=True) if label == 0)
    assert scores["recall"] == found / kept["test"]["label"].count(0)


@pytest.mark.parametrize(
    ("classes", "fields", "said"),
    [
        (("Cyst", "Tumor"), {}, r"^positive: .*Cyst, Tumor"),
        (("Cancer", "Healthy"), {"positive": "Mass"}, r"^positive: .*no class Mass"),
        (("Cyst", "Normal", "Tumor"), {"operate_at": {"sensitivity": 0.9}}, r"^operate_at: .*Cyst, Normal, Tumor"),
    ],
)
def test_what_does_not_fit_the_classes_fails_the_first_stage(tmp_path, classes, fields, said):
    config = load_config(write_config(tmp_path, write_zip(make_files(6, classes, SIDE), tmp_path / "data.zip")))
    with pytest.raises(BadParams, match=said):
        runner.run_stage(STAGES[0], Run(config, parse_params(SMALL | fields), lambda event: None))


@pytest.mark.slow
def test_an_evaluation_alone_reads_the_models_own_threshold(small_run, tmp_path):
    """It used to choose one of its own, which no prediction used."""
    config = load_config(write_config(tmp_path, small_run.archive))
    params, events = parse_params(SMALL | {"augmentation": False, "epochs": 1}), list[Event]()
    for stage in STAGES[:3]:
        runner.run_stage(stage, Run(config, params, events.append))
    trained = network.load(config.training.trained_model_path)
    changed = {**trained.metadata, "calibration": {"temperature": 2.0, "threshold": 0.123, "reason": "Its own."}}
    network.save(replace(trained, metadata=changed), config.training.trained_model_path)
    runner.run_stage(STAGES[3], Run(config, params, events.append))
    scores = scores_of(events)
    assert (scores["threshold"], scores["temperature"], scores["calibration"]) == (0.123, 2.0, "Its own.")
