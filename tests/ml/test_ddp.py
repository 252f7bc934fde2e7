"""DDP: two processes train like one, and no worker outlives the others. On the CPU, by gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.image.engines.backends import open_engine
from ml.image.engines.features import Features
from ml.image.learning.checkpoints import CheckpointWriter, Origin, load
from ml.image.learning.ddp_launch import WorkerLost, launch_workers
from ml.image.learning.ddp_worker import training_group
from ml.image.learning.train import ResumePoint, TrainConfig, TrainData, train
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.cache import Cache, Cached
from ml.runtime.config import CheckpointPlan
from ml.runtime.errors import BadParams, PipelineError
from ml.runtime.events import Epoch
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params
from tests.ml.builders import (
    CLASSES,
    make_data,
    make_narrow_model,
    make_params,
    make_scans,
    make_split,
    make_tiny_model,
    make_tuned_data,
)

EXACT = {"precision": "fp32", "dropout": 0.0, "learning_rate": 0.003}


@pytest.fixture(autouse=True)
def _a_machine_without_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if torch.cuda.is_available():
        pytest.skip("these processes are to use the CPU")


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_row_belongs_to_one_process(count, size):
    rows = np.arange(count)
    shares = [ProcessGroup(rank, size).own_rows(rows) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == list(rows)


def test_a_process_without_rows_computes_one_to_discard():
    assert list(ProcessGroup(1, 2).rows_to_compute(np.array([5]))) == [5]
    assert list(ProcessGroup(1, 2).rows_to_compute(np.array([5, 6, 7]))) == [6]


# --- the same numbers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A worker that takes part in `exchange_all`."""

    def load(self) -> Callable[[ProcessGroup], object]:
        return exchange_all


def exchange_all(group: ProcessGroup) -> list[object]:
    one, five = np.array([[1.5, 2.5]]), np.arange(10.0).reshape(5, 2)
    return [
        group.gather_rows(group.rows_to_compute(one), 1).tolist(),
        group.gather_rows(group.rows_to_compute(five), 5).tolist(),
        group.sum([1.0, float(group.rank)]),
        group.all_true(np.array([True, group.rank == 0, False])).tolist(),
        group.broadcast(f"rank {group.rank}"),
    ]


@dataclass(frozen=True)
class Narrow:
    """A worker that trains a narrow or tiny model of the tests."""

    params: Params
    kind: str

    def load(self) -> Callable[[ProcessGroup], object]:
        return self.epochs

    def epochs(self, group: ProcessGroup, **config: object) -> list[Epoch]:
        model = make_tiny_model(dropout=0.0) if self.kind == "tiny" else make_narrow_model(head=self.kind, dropout=0.0)
        data = make_tuned_data(model, group) if self.kind == "tiny" else make_data(group=group)
        return list(train(TrainConfig(model, self.params, group=group, **config), data))

    def trained(self, group: ProcessGroup) -> Trained:
        """The epochs, and the losses of all steps."""
        losses: list[float] = []
        return Trained(self.epochs(group, on_step=lambda epoch, loss, rate: losses.append(loss)), losses)


@dataclass(frozen=True)
class Trained:
    epochs: list[Epoch]
    losses: list[float]


@dataclass(frozen=True)
class Several:
    """A worker that does several jobs, one after another: starting it takes much longer than any of them."""

    jobs: tuple[Exchange | Narrow, ...]

    def load(self) -> Callable[[ProcessGroup], object]:
        works = [job.load() for job in self.jobs]
        return lambda group: [work(group) for work in works]


def numbers_of(epochs: list[Epoch]) -> list[float]:
    kept = [replace(epoch, seconds=0.0) for epoch in epochs]
    return [value for one in kept for value in (one.train_loss, one.val_loss, one.train_accuracy, one.val_accuracy)]


def narrow(kind: str, **fields: object) -> Narrow:
    return Narrow(make_params(**{**EXACT, **fields}), kind)


CASES = {
    "gap": narrow("gap", augmentation=False),
    "gap, augmented": narrow("gap", augmentation=True),
    "vgg": narrow("vgg", augmentation=False),
    "vgg, everything": narrow(
        "vgg", accumulate=3, clip_norm=0.5, weight_decay=0.01, label_smoothing=0.1, balance="weights", batch_size=7,
        schedule="cosine", warmup_epochs=1,
    ),
    "tuned": narrow("tiny", augmentation=False, fine_tune_epochs=2, fine_tune_learning_rate=0.001),
    "tuned, adamw": narrow("tiny", fine_tune_epochs=2, optimizer="adamw", batch_size=11),
}  # fmt: skip
STOPS_EARLY = narrow("vgg", augmentation=False, epochs=50, patience=2)


@dataclass(frozen=True)
class Together:
    """What two processes have done, as their leader saw it."""

    group: ProcessGroup
    place: tuple[int, int, bool]
    exchanged: list[object]
    trained: dict[str, Trained]
    stopped: list[Epoch]


@pytest.fixture(scope="module")
def together() -> Together:
    """All that two processes do without a failure. The worker does the same in the same order."""
    with launch_workers(2, Several((Exchange(), *CASES.values(), STOPS_EARLY))) as group:
        place = (group.rank, group.size, group.is_leader)
        exchanged = exchange_all(group)
        trained = {name: case.trained(group) for name, case in CASES.items()}
        return Together(group, place, exchanged, trained, STOPS_EARLY.epochs(group))


def test_collectives_exchange_arrays_numbers_and_objects(together):
    assert together.place == (0, 2, True)
    assert together.exchanged == [
        [[1.5, 2.5]],
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0]],
        [2.0, 1.0],
        [True, False, False],
        "rank 0",
    ]


def test_after_a_training_the_leader_is_alone(together):
    assert (together.group.rank, together.group.size) == (0, 1)
    assert exchange_all(together.group)[2] == [1.0, 0.0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(together, case):
    alone, both = CASES[case].trained(SINGLE_PROCESS), together.trained[case]
    assert numbers_of(both.epochs) == pytest.approx(numbers_of(alone.epochs), rel=1e-5, abs=1e-6)
    assert both.losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-6)
    assert alone.epochs[-1].train_loss != pytest.approx(alone.epochs[0].train_loss, rel=1e-2)


def test_early_stopping_stays_in_step(together):
    assert len(together.stopped) == len(STOPS_EARLY.epochs(SINGLE_PROCESS)) < 50


# --- a real network --------------------------------------------------------------------------------------------------

SMALL = {"network": "resnet18", "image_size": [64, 64, 3], "epochs": 2, "augmentation": False, **EXACT}


def make_resnet() -> Model:
    built = network.build(2, 0, "resnet18", "gap", 0.0)
    model = Model(built, CLASSES, Transform(64, 64), {"params": {"dropout": 0.0}}, "resnet18", "gap")
    pixels = torch.from_numpy(make_scans(8, 64))
    network.calibrate_batch_norms(built, [model.transform.normalize(pixels)])
    return model


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pixels") / "pixels.npy"
    np.save(path, make_scans(side=64))
    return path


def train_resnet(params: Params, pixels: Path, folder: Path, **where: object) -> list[Epoch]:
    """Train as the training stage does, with cache and checkpoints."""
    model, split, labels = make_resnet(), make_split(), np.arange(44) % 2
    cached = Cached(Cache(folder / "cache", 2**30), "key")
    resume, start = where.get("resume"), where.get("start", ResumePoint())
    with training_group(
        params, model, pixels=pixels, labels=labels, split=split, positive=(1,), resume=resume, folder=folder
    ) as group:
        opened: dict[int, Features] = {}

        def features(top: int) -> Features:
            if top not in opened:
                backbone = open_engine(model.cut(top)[0], model.transform, "fp32")
                opened[top] = Features(backbone, np.load(pixels), group, cached if top == 0 else None)
            return opened[top]

        epochs = list(start.history)
        keeper = where.get("keep", lambda epoch, state: None)
        for epoch in train(
            TrainConfig(model, params, group=group, start=start, on_checkpoint=keeper),
            TrainData(features, labels, split, 1),
        ):
            epochs.append(epoch)
            where.get("on_epoch", lambda epoch: None)(epoch)
    features(0).store_in_cache()
    features(0).plain(split.test)  # the evaluation's; by the leader alone
    return epochs


@pytest.mark.slow
def test_two_processes_train_fine_tune_and_resume_a_real_network_like_one(pixels, tmp_path):
    params = make_params(
        **SMALL, fine_tune_epochs=2, fine_tune_learning_rate=0.001, monitor="val_f1", patience=1
    )  # fmt: skip
    alone = train_resnet(params, pixels, tmp_path / "a")
    (tmp_path / "b").mkdir()
    params = params.model_copy(update={"devices": 2})
    origin, done = Origin(params.model_dump(mode="json"), "digest", "scans", 7, "engine"), []
    keep = CheckpointWriter(CheckpointPlan(tmp_path / "kept", 0.0), origin, done, lambda event: None)
    both = train_resnet(params, pixels, tmp_path / "b", keep=keep, on_epoch=done.append)
    assert numbers_of(both) == pytest.approx(numbers_of(alone), rel=1e-3, abs=1e-4)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["cache"]

    kept = sorted((tmp_path / "kept").iterdir())[-1]
    checkpoint = load(kept)
    start = ResumePoint(checkpoint.history, checkpoint.state)
    resumed = train_resnet(params, pixels, tmp_path / "b", resume=kept, start=start)
    assert 0 < checkpoint.epoch < len(both)
    assert numbers_of(resumed) == numbers_of(both)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_too_few_devices_raise_bad_params():
    with pytest.raises(BadParams, match=r"^devices: .*no GPU"), launch_workers(64, Exchange()):
        raise AssertionError("nobody may come this far")


@dataclass(frozen=True)
class Failing:
    """A worker that fails while it loads, or while it works."""

    error: Exception
    loading: bool = False

    def load(self) -> Callable[[ProcessGroup], None]:
        if self.loading:
            raise self.error
        return self._fail

    def _fail(self, group: ProcessGroup) -> None:
        raise self.error


WRONG = (BadParams("learning_rate: too large."), "BAD_PARAMS", "learning_rate: too large")
OOM = (torch.OutOfMemoryError("CUDA out of memory"), "DEVICE_OOM", "smaller batch_size")
UNFORESEEN = (ValueError("a secret"), "INTERNAL", "unforeseen ValueError")


@pytest.mark.parametrize(
    ("error", "code", "words", "loading"),
    [
        (*WRONG, True),
        (*OOM, False),
        (*UNFORESEEN, False),
        *(
            pytest.param(*other, marks=pytest.mark.full)
            for other in ((*WRONG, False), (*OOM, True), (*UNFORESEEN, True))
        ),
    ],
)
def test_an_error_of_a_worker_is_raised_by_the_leader(error, code, words, loading):
    started = time.monotonic()
    with pytest.raises(PipelineError, match=words) as raised, launch_workers(2, Failing(error, loading)) as group:
        exchange_all(group)
    assert raised.value.code == code
    assert time.monotonic() - started < 60
    assert worker_pids() == []


def _fail_with_threads(number: int) -> None:
    assert torch.get_num_threads() == number
    raise ZeroDivisionError


def test_the_cores_are_shared_and_an_error_of_the_leader_is_raised_unchanged():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(ZeroDivisionError), launch_workers(2, Exchange()):
            _fail_with_threads(2)
        assert worker_pids() == []
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Endless:
    """Workers that exchange numbers forever; the one with `rank` ends by `signal` after the third time."""

    ending: int
    rank: int = 1

    def load(self) -> Callable[[ProcessGroup], None]:
        return self._go_on

    def _go_on(self, group: ProcessGroup) -> None:
        for number in range(10**9):
            if number == 3 and group.rank == self.rank:
                os.kill(os.getpid(), self.ending)
            group.sum([1.0])
            time.sleep(0.05)


def exchange_forever(group: ProcessGroup, started: list[float]) -> None:
    """The leader's part of `Endless`; notes when it started."""
    started.append(time.monotonic())
    while True:
        group.sum([1.0])


def worker_pids() -> list[int]:
    """The worker processes of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"ml.image.learning.ddp_worker" in command and parent == os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(("size", "ending"), [(2, signal.SIGTERM), (3, signal.SIGKILL)])
def test_a_killed_worker_ends_the_training_at_once_and_is_named(size, ending, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: size)
    started: list[float] = []
    named = f"Process {size} of the {size} .* signal {ending}"
    with pytest.raises(WorkerLost, match=named) as raised, launch_workers(size, Endless(ending, size - 1)) as group:
        exchange_forever(group, started)
    assert time.monotonic() - started[0] < 10
    assert raised.value.retryable
    assert worker_pids() == []


LEADER = """
import sys, time
from tests.ml.test_ddp import Endless
from ml.image.learning.ddp_launch import launch_workers
import signal
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
with launch_workers(2, Endless(0, 99)) as team:
    print("launched", flush=True)
    while True:
        team.sum([1.0])
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_leader(ending, tmp_path):
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )  # fmt: skip
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == b"launched\n"
        (worker,) = children_of(leader.pid)
        leader.send_signal(ending)
        leader.wait(20)
        deadline = time.monotonic() + 10
        while is_there(worker):
            assert time.monotonic() < deadline, "the worker is still there"
            time.sleep(0.05)
        if ending == signal.SIGTERM:
            assert leader.returncode == 143
            assert list(tmp_path.iterdir()) == []
    finally:
        leader.kill()
        leader.wait()
        leader.stdout.close()
