"""The four stages, together and alone, and the child process that the worker starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ml import network, stages
from ml.config import load_config
from ml.errors import BadDataset, BadParams, DownloadFailed, WeightsMissing
from ml.events import STAGES, Epoch, Evaluated, Failed, Finished, StageFinished, StageStarted, from_json
from ml.params import parse_params
from tests.ml.builders import DATA, make_files, write_zip
from tests.ml.conftest import SIDE, SMALL, write_config


def write_params(folder: Path, **fields: object) -> Path:
    (folder / "params.yaml").write_text(yaml.safe_dump({**SMALL, **fields}))
    return folder / "params.yaml"


def start(folder: Path, stage: str = "run", **fields: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ml", stage, "--events", "--config", str(folder / "config.yaml")]
    params = write_params(folder, **fields)
    return subprocess.Popen(
        [*command, "--params", str(params)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_a_run_tells_stages_epochs_scores_and_its_end_in_order(small_run):
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
    assert set(finished.artifacts) >= {"scores.json", "confusion_matrix.png", "learning_curves.png", "history.json"}
    for name, path in finished.artifacts.items():
        if name.endswith(".png"):
            with Image.open(path) as picture:
                assert picture.width > 300
    assert finished.device_seconds > 0


def test_the_scores_are_those_of_scans_that_training_never_saw(small_run):
    scores = next(event.metrics for event in small_run.events if isinstance(event, Evaluated))
    assert scores == json.loads((small_run.folder / "evaluation" / "scores.json").read_text())
    assert scores["held_out"] == 8
    last = [event for event in small_run.events if isinstance(event, Epoch)][-1]
    assert scores["accuracy"] == pytest.approx(last.val_accuracy)
    assert scores["loss"] == pytest.approx(last.val_loss, rel=1e-2, abs=1e-4)


def test_nothing_temporary_stays_behind(small_run):
    assert not [path for path in small_run.folder.rglob("*") if "partial" in path.name or path.name.startswith(".")]


@pytest.mark.slow
def test_stages_alone_give_what_a_run_gives(small_run, tmp_path):
    config, params = (
        load_config(write_config(tmp_path, small_run.archive)),
        parse_params(SMALL | {"augmentation": False}),
    )
    events = []
    for stage in STAGES:
        stages.run_stage(stage, stages.Run(config, params, events.append))
    ours = next(event.metrics for event in events if isinstance(event, Evaluated))
    theirs = next(event.metrics for event in small_run.events if isinstance(event, Evaluated))
    assert ours["confusion_matrix"] == theirs["confusion_matrix"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05, abs=1e-3)
    assert config.prepare_base_model.base_model_path.exists()
    assert network.read_metadata(config.prepare_base_model.updated_base_model_path)["classes"] == ["Normal", "Tumor"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_without_its_input_says_which_stage_to_run(tmp_path, stage):
    state = stages.Run(load_config(write_config(tmp_path)), parse_params(SMALL), lambda event: None)
    with pytest.raises(BadDataset, match="run the stage data_ingestion first"):
        stages.run_stage(stage, state)


def ingest(folder: Path, archive: Path | None = None, source_url: str | None = None, **fields: object) -> None:
    config = load_config(write_config(folder, archive, source_url))
    stages.data_ingestion(stages.Run(config, parse_params({**SMALL, **fields}), lambda event: None))


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


def test_no_file_and_no_source_is_an_error_of_the_config(tmp_path):
    with pytest.raises(BadParams, match="source_URL"):
        ingest(tmp_path)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DownloadFailed, match="cannot be reached"):
        ingest(tmp_path, source_url="http://127.0.0.1:9/data.zip")


def test_without_imagenet_weights_the_stage_says_what_to_put_where(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "imagenet_url", lambda: "http://127.0.0.1:9/none")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    config = load_config(write_config(tmp_path, small_run.archive))
    state = stages.Run(config, parse_params({**SMALL, "weights": "imagenet"}), lambda event: None, tmp_path / "weights")
    stages.data_ingestion(state)
    with pytest.raises(WeightsMissing, match=r"vgg16-397923af\.pth"):
        stages.prepare_base_model(state)


def test_another_image_size_than_the_ingested_is_named(small_run):
    config = load_config(small_run.folder / "config.yaml")
    state = stages.Run(config, parse_params({**SMALL, "image_size": [96, 96, 3]}), lambda event: None)
    with pytest.raises(BadParams, match="image_size"):
        stages.load_pixels(state)


# --- the child process -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_child_writes_events_and_nothing_else_on_stdout(tmp_path):
    write_config(tmp_path, write_zip(make_files(8, side=SIDE), tmp_path / "data.zip"))
    child = start(tmp_path, epochs=1)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    events = [from_json(line) for line in output.splitlines()]
    assert isinstance(events[0], StageStarted)
    assert isinstance(events[-1], Finished)


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
@pytest.mark.parametrize("seed", [1])
def test_real_scans_are_learned_without_imagenet_weights(tmp_path, seed):
    archive = DATA / "mri-465.zip"
    if not archive.exists():
        pytest.skip("the shared data are not here")
    params = {"weights": "none", "learning_rate": 0.01, "epochs": 5, "augmentation": False, "seed": seed}
    events = []
    stages.run(load_config(write_config(tmp_path, archive)), parse_params(params), events.append)
    scores = next(event.metrics for event in events if isinstance(event, Evaluated))
    assert scores["held_out"] == pytest.approx(93, abs=6)
    assert scores["f1"] >= 0.93
