"""A training's checkpoints: what it takes to go on after an epoch as if nothing had happened.

A checkpoint is a safetensors file. Its tensors are those of what learns: weights, the optimizer's, standardization
(`ml.image.learning.vgg_head.VggHeadLearner.state` says when few of them are enough), and the weights of the best epoch where
that is another one. Its metadata carry the rest:

- the epochs so far, and the origin: what the training is made of. Another origin is refused;
- the sampler's position, always the beginning of the next epoch. Schedule, best epoch and early stopping are functions
  of the epochs so far (ml.image.learning.schedules), and have no state of their own;
- the random state, which is two numbers. Shuffling, dropout and augmentation draw from generators that are seeded with
  (seed, epoch) and, for augmentation, the scan; no global generator is ever drawn from. So nothing else is stored;
- a checksum of each tensor, since safetensors itself notices a file that is too short, but not one with a hole in it.

On one machine a resumed training ends with the very numbers of an undisturbed one. On another machine, or another
engine, the features differ by a rounding: that is allowed, and logged, because the machine that died is often the
reason for resuming.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ml.image.dataset.scans import DatasetReport
from ml.runtime import tensorfile
from ml.runtime.config import CheckpointPlan
from ml.runtime.errors import BadCheckpoint
from ml.runtime.events import Checkpointed, Emit, Epoch
from ml.spec.image import Params

FORMAT_VERSION = 2
_METADATA_KEY = "renalq-checkpoint"
_NOT_OURS = "The file is not a whole RenalQ checkpoint."

log = logging.getLogger("ml")


@dataclass(frozen=True)
class Origin:
    """What a training is made of. Only a training with the same parameters, scans and network can be continued."""

    params: dict[str, Any]
    dataset_digest: str
    scans: str  # the digest does not see the scans' order and patients; split and batches do
    network: int  # checksum of all weights as they were before training
    engine: str

    @classmethod
    def from_training(cls, params: Params, report: DatasetReport, network: nn.Module, engine: str) -> Origin:
        """The origin of a training that has not begun."""
        scans = json.dumps([(scan.label, scan.sha256, scan.patient) for scan in report.scans])
        # Parameters only: what an untrained network's normalizations are calibrated to differs by a machine's rounding.
        weights = sum(checksum(value) for value in network.parameters())
        digest = hashlib.sha256(scans.encode()).hexdigest()
        return cls(params.model_dump(mode="json"), report.digest, digest, weights, engine)


@dataclass(frozen=True)
class Checkpoint:
    """A training after an epoch."""

    origin: Origin
    history: tuple[Epoch, ...]
    state: Mapping[str, Tensor]

    @property
    def epoch(self) -> int:
        """The last epoch that is done."""
        return self.history[-1].epoch

    def raise_unless_from(self, origin: Origin) -> None:
        """BadCheckpoint unless it was `origin` that got this far; another engine is only logged."""
        theirs, ours = self.origin, origin
        others = sorted(name for name, value in ours.params.items() if theirs.params.get(name, value) != value)
        if others or theirs.params.keys() != ours.params.keys():
            raise BadCheckpoint(f"The checkpoint is of a training with other parameters: {', '.join(others)}.")
        if (theirs.dataset_digest, theirs.scans) != (ours.dataset_digest, ours.scans):
            raise BadCheckpoint("The checkpoint is of a training on another dataset.")
        if theirs.network != ours.network:
            raise BadCheckpoint("The checkpoint is of a training that began with other weights.")
        if theirs.engine != ours.engine:
            log.warning("The epochs before were computed by %s, the next ones by %s.", theirs.engine, ours.engine)


def checksum(tensor: Tensor) -> int:
    """The sum of the tensor's bytes as 64-bit numbers: a change of one bit changes it, at the speed of memory."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    width = torch.int64 if flat.nbytes % 8 == 0 else torch.int32 if flat.nbytes % 4 == 0 else torch.uint8
    return int(flat.view(width).sum(dtype=torch.int64))


# --- the file --------------------------------------------------------------------------------------------------------


def save(state: Checkpoint, path: Path) -> None:
    """Write a checkpoint that is whole or not there (see `ml.runtime.tensorfile`); OSError where the system refuses."""
    described = {
        "format_version": FORMAT_VERSION,
        "origin": asdict(state.origin),
        "history": [asdict(epoch) for epoch in state.history],
        "sampler": {"epoch": state.epoch + 1, "batch": 0},
        "random": {"seed": state.origin.params["seed"], "epoch": state.epoch + 1},
        "checksums": {name: checksum(value) for name, value in state.state.items()},
    }
    tensorfile.write(state.state, path, {_METADATA_KEY: json.dumps(described)})


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; BadCheckpoint for a torn or foreign file. Its tensors stay mapped from the file,
    which may be removed meanwhile; never write into them.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            described = json.loads((opened.metadata() or {})[_METADATA_KEY])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        if described["format_version"] != FORMAT_VERSION:
            raise BadCheckpoint(f"The checkpoint has another format than version {FORMAT_VERSION}.")
        if described["checksums"] != {name: checksum(value) for name, value in state.items()}:
            raise BadCheckpoint(_NOT_OURS)
        history = tuple(Epoch(**fields) for fields in described["history"])
        return Checkpoint(Origin(**described["origin"]), history, state)
    except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
        raise BadCheckpoint(_NOT_OURS) from error


def load_resume_checkpoint(plan: CheckpointPlan, origin: Origin) -> Checkpoint | None:
    """The checkpoint that the plan goes on from; BadCheckpoint when it is not one of the same training."""
    if plan.resume is None:
        return None
    checkpoint = load(plan.resume)
    checkpoint.raise_unless_from(origin)
    return checkpoint


# --- during a training -----------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes a checkpoint at the end of an epoch, when it is time. `history` is the list that the training extends."""

    def __init__(self, plan: CheckpointPlan, origin: Origin, history: Sequence[Epoch], emit: Emit) -> None:
        self._plan, self._origin, self._history, self._emit = plan, origin, history, emit
        self._last = time.monotonic()

    def __call__(self, epoch: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """`epoch` is done and told; `state` gives what to keep."""
        if self._plan.folder is None or time.monotonic() - self._last < self._plan.seconds:
            return
        path = self._plan.folder / f"epoch-{epoch:04}.safetensors"
        started = time.perf_counter()
        try:
            save(Checkpoint(self._origin, tuple(self._history), state()), path)
        except OSError as error:
            # A checkpoint saves time if something fails; failing for want of one would be the greater loss.
            log.warning("No checkpoint of epoch %d was written (%s); the training goes on.", epoch, error.strerror)
        else:
            self._emit(Checkpointed(epoch, str(path), round(time.perf_counter() - started, 3)))
        self._last = time.monotonic()
