"""A training that is killed after an epoch and resumed gives exactly the numbers of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import DatasetReport
from ml.image.learning import checkpoints
from ml.image.learning.checkpoints import Checkpoint, CheckpointWriter, Origin, checksum, load, save
from ml.image.learning.schedules import best_epoch
from ml.image.learning.train import ResumePoint, TrainConfig, TrainData, train
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.runtime.config import CheckpointPlan
from ml.runtime.errors import BadCheckpoint
from ml.runtime.events import (
    Checkpointed,
    Epoch,
    Evaluated,
    Event,
    Failed,
    Finished,
    Progress,
    Resumed,
    StageStarted,
    from_json,
)
from ml.spec.image import Params
from tests.depth import rest_in_full
from tests.ml.builders import (
    make_data,
    make_narrow_model,
    make_params,
    make_tiny_model,
    make_tuned_data,
)
from tests.ml.conftest import SMALL, write_config

EPOCHS = 4


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_epoch(number: int = 1) -> Epoch:
    return Epoch(number, EPOCHS, 0.1 + number / 3, 0.75, 0.6, 0.7, 0.001, 3.25)


def make_report(*names: str) -> DatasetReport:
    scans = tuple(ScanFile(name, "Normal", f"sha of {name}", None) for name in names)
    return DatasetReport({"Normal": len(scans)}, len(scans), "digest", (), scans)


def make_origin(**fields: object) -> Origin:
    origin = Origin(make_params().model_dump(mode="json"), "digest", "scans", 7, "torch-fp32")
    return dataclasses.replace(origin, **fields)


def make_checkpoint(epoch: int = 2, **fields: object) -> Checkpoint:
    head = {"rest.bias": torch.arange(3.0), "first.a": torch.randn(50, 40), "s": torch.tensor(0.1, dtype=torch.float64)}
    return Checkpoint(make_origin(**fields), tuple(make_epoch(number + 1) for number in range(epoch)), head)


# --- the same numbers ------------------------------------------------------------------------------------------------


def numbers_of(epochs: list[Epoch]) -> list[Epoch]:
    """Epochs without their durations."""
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]


@dataclass(frozen=True)
class Case:
    """A training whose result must not depend on an interruption. `window`: scans in memory at once."""

    fields: dict[str, object]
    kind: str = "vgg"
    window: int = 2048

    @property
    def params(self) -> Params:
        return make_params(epochs=EPOCHS, **self.fields)

    def made(self) -> tuple[Model, TrainData]:
        if self.kind == "tiny":
            model = make_tiny_model()
            return model, make_tuned_data(model)
        return make_narrow_model(head=self.kind), make_data()


def train_whole(case: Case) -> tuple[Model, list[Epoch]]:
    model, data = case.made()
    return model, list(train(TrainConfig(model, case.params), data))


def train_until(epoch: int, case: Case, folder: Path) -> Checkpoint:
    """The checkpoint after `epoch` of a training that is then abandoned."""
    (model, data), done = case.made(), []
    keeper = CheckpointWriter(CheckpointPlan(folder, 0.0), make_origin(), done, lambda event: None)
    for one in train(TrainConfig(model, case.params, on_checkpoint=keeper), data):
        done.append(one)
        if one.epoch == epoch + 1:
            break
    return load(folder / f"epoch-{epoch:04}.safetensors")


def train_after(checkpoint: Checkpoint, case: Case, **config: object) -> tuple[Model, list[Epoch]]:
    model, data = case.made()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    start = ResumePoint(checkpoint.history, checkpoint.state)
    return model, [*checkpoint.history, *train(TrainConfig(model, case.params, start=start, **config), data)]


def assert_the_same_end(epoch: int, case: Case, folder: Path) -> tuple[Checkpoint, list[Epoch]]:
    whole, expected = train_whole(case)
    checkpoint = train_until(epoch, case, folder)
    resumed, epochs = train_after(checkpoint, case)
    assert numbers_of(epochs) == numbers_of(expected)
    assert expected[-1].train_loss != expected[epoch - 1].train_loss
    for name, value in resumed.network.state_dict().items():
        assert torch.equal(value, whole.network.state_dict()[name]), name
    return checkpoint, expected


PLAIN, CHANGED = {"augmentation": False}, {"augmentation": True}
CASES = {
    "one window": Case(PLAIN),
    "augmentation": Case(CHANGED),
    "several windows": Case(PLAIN, window=16),
    "several augmented windows": Case(CHANGED, window=16),
    "no momentum": Case({**PLAIN, "momentum": 0.0}),
    "augmentation and no momentum": Case({**CHANGED, "momentum": 0.0}),
    "as they are": Case({**CHANGED, "standardize": False, "learning_rate": 1e-4}),
    "decaying, clipped, accumulated": Case({**PLAIN, "weight_decay": 0.01, "clip_norm": 0.5, "accumulate": 3}),
    "decaying in windows": Case({**CHANGED, "weight_decay": 0.01, "clip_norm": 0.5}, window=16),
    "plateau": Case({**PLAIN, "schedule": "plateau", "step_epochs": 1, "monitor": "val_f1"}),
    "cosine": Case({**PLAIN, "schedule": "cosine", "warmup_epochs": 1}),
    "balanced": Case({**CHANGED, "balance": "sampler"}),
    "randaugment": Case({"augmentation": "randaugment"}),
    "gap": Case(PLAIN, "gap"),
    "gap, augmented": Case(CHANGED, "gap"),
    "adamw": Case({**PLAIN, "optimizer": "adamw"}),
    "adamw, augmented": Case({**CHANGED, "optimizer": "adamw", "weight_decay": 0.01}, "gap"),
}


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path, monkeypatch, case, epoch):
    monkeypatch.setattr("ml.image.learning.train.WINDOW", CASES[case].window)
    assert_the_same_end(epoch, CASES[case], tmp_path)


TUNED = {"fine_tune_epochs": 3, "fine_tune_learning_rate": 0.01, "precision": "fp32"}


@pytest.mark.parametrize("epoch", [2, EPOCHS, EPOCHS + 1, EPOCHS + 2])
@pytest.mark.parametrize("fields", [PLAIN, CHANGED, {**CHANGED, "optimizer": "adamw"}, {**PLAIN, "standardize": False}])
def test_so_does_one_with_unfrozen_blocks_also_at_the_border_of_its_phases(tmp_path, fields, epoch):
    checkpoint, _ = assert_the_same_end(epoch, Case({**fields, **TUNED}, "tiny"), tmp_path)
    assert checkpoint.history[-1].phase == ("head" if epoch <= EPOCHS else "fine_tune")


BEST_FIRST = {
    "head": (Case({**PLAIN, "learning_rate": 0.03, "monitor": "val_accuracy"}), 3),
    "windows": (Case({**PLAIN, "learning_rate": 0.02, "monitor": "val_accuracy"}, window=16), 3),
    "gap": (Case({**PLAIN, "learning_rate": 0.01, "monitor": "val_accuracy"}, "gap"), 3),
    "border": (Case({**PLAIN, **TUNED, "monitor": "val_accuracy", "learning_rate": 0.1}, "tiny"), EPOCHS),
    "tuning": (Case({**PLAIN, **TUNED, "learning_rate": 0.05, "fine_tune_learning_rate": 0.06}, "tiny"), EPOCHS + 1),
}


@pytest.mark.parametrize("name", BEST_FIRST)
def test_the_best_epochs_weights_travel_where_they_are_another_epochs(tmp_path, monkeypatch, name):
    case, epoch = BEST_FIRST[name]
    monkeypatch.setattr("ml.image.learning.train.WINDOW", case.window)
    checkpoint, epochs = assert_the_same_end(epoch, case, tmp_path)
    best = best_epoch(case.params, epochs)
    assert best <= epoch - 1, f"this test must choose: {best}"
    assert any(name.startswith("best.") for name in checkpoint.state)


def test_the_last_epochs_weights_are_not_kept_twice(tmp_path):
    checkpoint = train_until(2, Case({**PLAIN, "keep": "last"}), tmp_path)
    assert not any(name.startswith("best.") for name in checkpoint.state)


def test_a_training_that_had_lost_its_patience_does_not_go_on(tmp_path):
    case = Case({**PLAIN, **TUNED, "patience": 1, "learning_rate": 1.0, "monitor": "val_accuracy"}, "tiny")
    _, expected = train_whole(case)
    heads = [epoch for epoch in expected if epoch.phase == "head"]
    assert len(heads) < EPOCHS
    checkpoint = train_until(len(heads), case, tmp_path)
    _, epochs = train_after(checkpoint, case)
    assert numbers_of(epochs) == numbers_of(expected)


@pytest.mark.parametrize("augmentation", [False, True])
def test_without_augmentation_a_checkpoint_leaves_out_what_the_seed_gives_again(tmp_path, augmentation):
    checkpoint = train_until(1, Case({"augmentation": augmentation}), tmp_path)
    assert ("first.weight" in checkpoint.state) == augmentation


@pytest.mark.parametrize(
    ("case", "epoch", "between"),
    [(Case(PLAIN), 2, (0.4, 0.7)), (Case({**PLAIN, **TUNED}, "tiny"), EPOCHS, (0.03, 0.1)),
     (Case({**PLAIN, **TUNED}, "tiny"), EPOCHS + 2, (0.5, 0.95))],
)  # fmt: skip
def test_a_resumed_training_counts_the_epochs_before_as_done(tmp_path, case, epoch, between):
    heard: list[float] = []
    train_after(train_until(epoch, case, tmp_path), case, on_progress=heard.append)
    assert between[0] < heard[0] < between[1]
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)


# --- the file --------------------------------------------------------------------------------------------------------

FIRST = "epoch-0001.safetensors"


def test_a_checkpoint_comes_back_from_its_file_exactly(tmp_path):
    kept = make_checkpoint()
    save(kept, tmp_path / "new" / "one.safetensors")
    read = load(tmp_path / "new" / "one.safetensors")
    assert (read.origin, read.history, read.epoch) == (kept.origin, kept.history, 2)
    assert read.state.keys() == kept.state.keys()
    assert all(torch.equal(read.state[name], value) for name, value in kept.state.items())
    assert names_in(tmp_path / "new") == ["one.safetensors"]


@pytest.mark.parametrize("length", [0, 1, 7, 100, 2000, -1])
def test_a_torn_checkpoint_is_refused(tmp_path, length):
    path = tmp_path / "one.safetensors"
    save(make_checkpoint(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadCheckpoint, match="not a whole RenalQ checkpoint"):
        load(path)


def test_a_checkpoint_with_a_hole_is_refused(tmp_path):
    path = tmp_path / "one.safetensors"
    save(make_checkpoint(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-16] + bytes(16))
    with pytest.raises(BadCheckpoint, match="not a whole"):
        load(path)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, str(path))


def of_the_future(path: Path) -> None:
    checkpoints.FORMAT_VERSION += 1
    try:
        save(make_checkpoint(), path)
    finally:
        checkpoints.FORMAT_VERSION -= 1


@pytest.mark.parametrize("write", [foreign, of_the_future, lambda path: None, lambda path: path.write_bytes(b"junk")])
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, write: Callable[[Path], None]):
    write(tmp_path / "one.safetensors")
    with pytest.raises(BadCheckpoint):
        load(tmp_path / "one.safetensors")


@pytest.mark.parametrize("tensor", [torch.randn(5, 7), torch.randn(3), torch.tensor(1.5), torch.arange(3).byte()])
def test_a_changed_bit_changes_the_checksum(tensor: Tensor):
    changed = tensor.clone().view(-1).view(torch.uint8)
    changed[-1] ^= 1
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(changed.view(tensor.dtype)) != checksum(tensor)


# --- which training --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_same_training_is_taken():
    make_checkpoint().raise_unless_from(make_origin())


def test_another_engine_is_accepted_and_logged(caplog):
    make_checkpoint(engine="openvino").raise_unless_from(make_origin())
    assert "openvino" in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"params": make_params(learning_rate=0.5, seed=3).model_dump(mode="json")}, "learning_rate, seed"),
        ({"params": make_params(epochs=9).model_dump(mode="json")}, "epochs"),
        ({"dataset_digest": "other"}, "dataset"),
        ({"scans": "other"}, "dataset"),
        ({"network": 8}, "weights"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_with_the_reason(fields, reason):
    other = dataclasses.replace(make_origin(), **fields)
    with pytest.raises(BadCheckpoint, match=reason):
        make_checkpoint().raise_unless_from(other)


def test_the_same_scans_under_other_names_are_another_training():
    reports = make_report("a", "b"), make_report("b", "a")
    first, second = (Origin.from_training(make_params(), report, nn.Linear(3, 2), "x") for report in reports)
    assert first.dataset_digest == second.dataset_digest
    assert first.scans != second.scans


# --- when ------------------------------------------------------------------------------------------------------------


def keep_epochs(plan: CheckpointPlan, epochs: int = 3) -> list[Event]:
    told: list[Event] = []
    done: list[Epoch] = []
    keeper = CheckpointWriter(plan, make_origin(), done, told.append)
    for number in range(1, epochs + 1):
        done.append(make_epoch(number))
        keeper(number, lambda: make_checkpoint().state)
    return told


def test_zero_seconds_keep_each_epoch_under_its_number(tmp_path):
    told = keep_epochs(CheckpointPlan(tmp_path, 0.0))
    names = [f"epoch-000{number}.safetensors" for number in (1, 2, 3)]
    assert [(event.epoch, Path(event.path).name) for event in told] == list(zip((1, 2, 3), names, strict=True))
    assert names_in(tmp_path) == names
    assert [load(tmp_path / name).epoch for name in names] == [1, 2, 3]


def test_before_the_seconds_are_over_nothing_is_kept(tmp_path):
    assert keep_epochs(CheckpointPlan(tmp_path, 3600.0)) == []
    assert keep_epochs(CheckpointPlan()) == []
    assert names_in(tmp_path) == []


def test_a_moved_checkpoint_is_not_missed(tmp_path):
    done = [make_epoch()]
    keeper = CheckpointWriter(
        CheckpointPlan(tmp_path, 0.0), make_origin(), done, lambda event: Path(event.path).unlink()
    )
    keeper(1, lambda: make_checkpoint().state)
    keeper(1, lambda: make_checkpoint().state)
    assert names_in(tmp_path) == []


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(small_disk, caplog):
    plan = CheckpointPlan(small_disk, 0.0)
    assert len(keep_epochs(plan, epochs=1)) == 1
    kept = (small_disk / FIRST).read_bytes()
    told: list[Event] = []
    keeper = CheckpointWriter(plan, make_origin(), [make_epoch()], told.append)
    keeper(1, lambda: {"large": torch.zeros(2**19)})
    assert told == []
    assert "No space left" in caplog.text
    assert names_in(small_disk) == [FIRST]
    assert (small_disk / FIRST).read_bytes() == kept


def test_a_full_disk_is_named_where_a_model_or_the_pixels_are_written(small_disk):
    from ml.runtime import tensorfile
    from ml.runtime.errors import as_pipeline_error

    with pytest.raises(OSError, match="No space") as full:
        tensorfile.write({"large": torch.zeros(2**19)}, small_disk / "model.safetensors", "key", {})
    assert full.value.errno == errno.ENOSPC
    assert as_pipeline_error(full.value).code == "STORAGE_FULL"
    with (small_disk / "pixels.npy").open("wb") as file, pytest.raises(OSError, match="No space"):
        tensorfile.reserve(file.fileno(), 2**21)


# --- the child process -----------------------------------------------------------------------------------------------


def start_child(folder: Path, archive: Path, *options: str, **fields: object) -> subprocess.Popen[str]:
    """`python -m ml train` in a folder of its own."""
    config, params = write_config(folder, archive), folder / "params.yaml"
    params.write_text(yaml.safe_dump({**SMALL, **fields}))
    command = [sys.executable, "-m", "ml", "train", "--events", "--config", str(config), "--params", str(params)]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events_of(child: subprocess.Popen[str]) -> list[Event]:
    """They are all that a child writes on stdout."""
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return [from_json(line) for line in output.splitlines()]


def kill_after(epoch: int, child: subprocess.Popen[str], take: Path) -> Path:
    """kill -9 once the checkpoint of `epoch` is reported; each one is moved into the folder `take` at once."""
    assert child.stdout is not None
    take.mkdir()
    for line in child.stdout:
        match from_json(line):
            case Checkpointed(number, path):
                moved = Path(path).rename(take / Path(path).name)
                if number == epoch:
                    child.kill()
                    child.communicate(timeout=30)
                    return moved
    raise AssertionError("the child told of no such checkpoint")


@pytest.mark.slow
@pytest.mark.scaled
@pytest.mark.parametrize("augmentation", rest_in_full([False, True], lambda augmentation: not augmentation))
def test_a_killed_child_is_resumed_to_the_same_end(small_run, tmp_path, augmentation):
    whole = small_run.folder, small_run.events  # in this process, without checkpoints
    if augmentation:
        whole = tmp_path / "whole", events_of(start_child(tmp_path / "whole", small_run.archive))
    keeping = ("--checkpoints", str(tmp_path / "kept"), "--checkpoint-seconds", "0")
    killed = start_child(tmp_path / "killed", small_run.archive, *keeping, augmentation=augmentation)
    kept = kill_after(2, killed, tmp_path / "taken")
    again = start_child(
        tmp_path / "again", small_run.archive, *keeping, "--resume", str(kept), augmentation=augmentation
    )
    resumed = events_of(again)
    assert isinstance(resumed[0], StageStarted)
    assert isinstance(resumed[-1], Finished)
    assert [event for event in resumed if isinstance(event, Resumed)] == [Resumed(2)]
    known = resumed[resumed.index(Resumed(2)) :]
    told = [event.fraction for event in known if isinstance(event, Progress) and event.stage == "training"]
    assert min(told) > 0.03, "the epochs before count, as soon as it is known how far it is"
    assert [event.epoch for event in resumed if isinstance(event, Epoch)] == [3]
    assert [event.epoch for event in resumed if isinstance(event, Checkpointed)] == []
    assert scores_of(resumed) == scores_of(whole[1])
    assert history_of(tmp_path / "again") == history_of(whole[0])
    assert weights_of(tmp_path / "again") == weights_of(whole[0])


def history_of(folder: Path) -> list[Epoch]:
    history = json.loads((folder / "training" / "history.json").read_text())
    return numbers_of([Epoch(**epoch) for epoch in history])


def scores_of(events: list[Event]) -> list[dict[str, object]]:
    return [event.metrics for event in events if isinstance(event, Evaluated)]


def weights_of(folder: Path) -> dict[str, int]:
    state = network.load(folder / "training" / "model.safetensors").network.state_dict()
    return {name: checksum(value) for name, value in state.items()}


@pytest.mark.slow
def test_a_child_that_gets_a_foreign_checkpoint_says_so(small_run, tmp_path):
    foreign(tmp_path / "foreign.safetensors")
    child = start_child(tmp_path / "run", small_run.archive, "--resume", str(tmp_path / "foreign.safetensors"))
    output, _ = child.communicate(timeout=60)
    failed = from_json(output.splitlines()[-1])
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable, child.returncode) == ("BAD_CHECKPOINT", False, 1)


@pytest.mark.full
def test_sigterm_while_a_checkpoint_is_written_leaves_nothing_half_written(small_run, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    options = ("--checkpoints", str(kept), "--checkpoint-seconds", "0")
    child = start_child(tmp_path / "run", small_run.archive, *options, head="vgg")  # its checkpoints are large
    deadline = time.monotonic() + 60
    while not names_in(kept):  # the first thing to appear is a temporary file
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert all(name.startswith(".") for name in names_in(kept))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 143
    assert names_in(kept) == []
