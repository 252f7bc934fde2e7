"""Training on several devices: starts the DDP workers, and is the main program of a worker.

`python -m ml.image.learning.ddp_worker FILE` runs a worker; FILE holds its pickled `RankConfig`.
"""

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
from ml.spec.private_logs import hide_messages


@dataclass(frozen=True)
class WorkerTraining:
    """A training as a worker runs it; see `ml.image.learning.ddp_launch.Job`.

    `model`: a model file; `pixels`: a .npy file; `labels`, `split`, `positive`: as in
    `ml.image.learning.train.TrainData`; `resume`: the checkpoint that the leader continues from.
    """

    model: Path
    pixels: Path
    params: Params
    labels: np.ndarray
    split: Split
    positive: tuple[int, ...] = ()
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
    positive: tuple[int, ...] = (),
    resume: Path | None = None,
    folder: Path | None = None,
) -> Iterator[ProcessGroup]:
    """The process group that trains `model` on `params.devices` devices; with one device, this process alone.

    Args:
        params: the parameters of the training.
        model: the network before training.
        pixels: the .npy file with the pixels of all scans.
        labels, split, positive: as in `ml.image.learning.train.TrainData`. Workers need them to find the same best
            epoch.
        resume: the checkpoint that the training continues from.
        folder: where to write the model for the workers while they start.

    Raises:
        BadParams: the machine has fewer devices.
        PipelineError: an error of a worker, or `ml.image.learning.ddp_launch.WorkerLost`; from the `with` block.
    """
    if params.devices == 1:
        yield SINGLE_PROCESS
        return
    with TemporaryDirectory(prefix="renalq-ddp-model-", dir=folder) as scratch:
        path = Path(scratch) / "model.safetensors"
        network.save(model, path)
        job = WorkerTraining(path, pixels.absolute(), params, labels, split, positive, resume and resume.absolute())
        with launch_workers(params.devices, job, folder) as group:
            path.unlink()  # all workers have mapped it by now
            yield group


# --- the worker process ----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the worker whose `RankConfig` is in the file that the command line names."""
    hide_messages()  # the leader tells what went wrong
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; only the leader reacts, and ends them
    threading.Thread(target=_exit_with_leader, daemon=True).start()
    config = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - written by the leader, in its own folder
    assert isinstance(config, RankConfig)
    run_worker(config)
    return 0


def _exit_with_leader() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
