"""A process of a training on several devices. `training_group` starts them; `python -m ml.image.learning.ddp_worker
FILE` is one."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ml.image.dataset.splits import Split
from ml.image.engines.backends import open_engine, training_precision
from ml.image.engines.features import Features
from ml.image.learning.checkpoints import load
from ml.image.learning.ddp_launch import RankConfig, launch_workers, run_worker
from ml.image.learning.train import ResumePoint, TrainConfig, TrainData, train
from ml.image.networks import network
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params


@dataclass(frozen=True)
class TrainingJob:
    """A training as a member does it: the network's file, the pixels' file (.npy), and what the leader knows besides.

    See `ml.image.learning.ddp_launch.Job`. `resume`: the checkpoint that the leader goes on from.
    """

    model: Path
    pixels: Path
    params: Params
    labels: np.ndarray
    split: Split
    positive: int | None = None
    resume: Path | None = None

    def load(self) -> Callable[[ProcessGroup], None]:
        """See `ml.image.learning.ddp_launch.Job`."""
        model = network.load(self.model)
        network.own_memory(model)
        pixels = np.load(self.pixels, mmap_mode="r")
        checkpoint = None if self.resume is None else load(self.resume)
        start = ResumePoint() if checkpoint is None else ResumePoint(checkpoint.history, checkpoint.state)
        return lambda group: self._train(model, pixels, start, group)

    def _train(self, model: network.Model, pixels: np.ndarray, start: ResumePoint, group: ProcessGroup) -> None:
        @cache
        def features(top: int) -> Features:
            below, _ = model.cut(top)
            return Features(open_engine(below, model.transform, training_precision(self.params)), pixels, group)

        config = TrainConfig(model, self.params, start=start, group=group)
        for _ in train(config, TrainData(features, self.labels, self.split, self.positive)):
            pass


@contextmanager
def training_group(
    params: Params,
    model: network.Model,
    *,
    pixels: Path,
    labels: np.ndarray,
    split: Split,
    positive: int | None = None,
    resume: Path | None = None,
    folder: Path | None = None,
) -> Iterator[ProcessGroup]:
    """The processes that train `model` together, as `params.devices` asks; with one device, this one alone.

    `pixels`: the file (.npy) of all scans' pixels; `labels`, `split`, `positive`: as in
    `ml.image.learning.train.TrainData`, since all have to find the same epoch the best; `resume`: the checkpoint
    that the training goes on from; `folder`: below it the model is written for the members, for as long as they
    start. BadParams names `devices` where the machine has too few; the `with` block raises the error of a member
    that fails.
    """
    if params.devices == 1:
        yield SINGLE_PROCESS
        return
    with TemporaryDirectory(prefix="renalq-member-", dir=folder) as place:
        path = Path(place) / "model.safetensors"
        network.save(model, path)
        job = TrainingJob(path, pixels.absolute(), params, labels, split, positive, resume and resume.absolute())
        with launch_workers(params.devices, job, folder) as group:
            path.unlink()  # each has it mapped by now
            yield group


# --- the process -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Be the member whose `RankConfig` is in the file that is named on the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the leader is the one that ends the team
    threading.Thread(target=_leave_with_the_leader, daemon=True).start()
    seat = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - our leader's, in a folder of its own
    assert isinstance(seat, RankConfig)
    run_worker(seat)
    return 0


def _leave_with_the_leader() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
