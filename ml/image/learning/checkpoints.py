"""Checkpoints of a training: everything that is needed to continue after an epoch as if it had not been interrupted.

A checkpoint is a safetensors file. Its tensors are the learner's (weights, optimizer, standardization; see
`ml.image.learning.vgg_head.VggHeadLearner.state` for when few of them are enough), and the weights of the best epoch if
that is another one. Its metadata contain the rest:

- the epochs so far, and the origin of the training; a checkpoint of another origin is refused;
- the sampler's position, which is always the start of the next epoch. Schedule, best epoch and early stopping are
  functions of the epochs so far (ml.image.learning.schedules) and have no state;
- the random state, which is two numbers: shuffling, dropout and augmentation use generators seeded with (seed, epoch)
  and, for augmentation, the scan. Global generators are never used;
- a checksum of each tensor: safetensors notices a truncated file, but not one with a hole in it.

On the same machine a resumed training gives exactly the numbers of an uninterrupted one. On another machine or engine,
features differ by rounding. This is allowed, and logged, since the failure of a machine is a common reason to resume.
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
    """What a training starts from; a checkpoint only continues one with the same parameters, scans and network."""

    params: dict[str, Any]
    dataset_digest: str
    scans: str  # unlike the digest, this hash covers the order and patients of scans
    network: int  # checksum of all weights before training
    engine: str

    @classmethod
    def from_training(cls, params: Params, report: DatasetReport, network: nn.Module, engine: str) -> Origin:
        """The origin of a training that has not started."""
        scans = json.dumps([(scan.label, scan.sha256, scan.patient) for scan in report.scans])
        # No buffers: the calibrated batch normalizations of an untrained network differ by rounding between machines.
        weights = sum(checksum(value) for value in network.parameters())
        digest = hashlib.sha256(scans.encode()).hexdigest()
        return cls(params.model_dump(mode="json"), report.digest, digest, weights, engine)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after an epoch."""

    origin: Origin
    history: tuple[Epoch, ...]
    state: Mapping[str, Tensor]

    @property
    def epoch(self) -> int:
        """The last finished epoch."""
        return self.history[-1].epoch

    def raise_unless_from(self, origin: Origin) -> None:
        """BadCheckpoint if this is a checkpoint of another training than `origin`; another engine is only logged."""
        theirs, ours = self.origin, origin
        others = sorted(name for name, value in ours.params.items() if theirs.params.get(name, value) != value)
        if others or theirs.params.keys() != ours.params.keys():
            raise BadCheckpoint(f"The checkpoint is of a training with other parameters: {', '.join(others)}.")
        if (theirs.dataset_digest, theirs.scans) != (ours.dataset_digest, ours.scans):
            raise BadCheckpoint("The checkpoint is of a training on another dataset.")
        if theirs.network != ours.network:
            raise BadCheckpoint("The checkpoint is of a training that began with other weights.")
        if theirs.engine != ours.engine:
            log.warning(
                "The training continues on another engine: until now %s, from now on %s.", theirs.engine, ours.engine
            )


def checksum(tensor: Tensor) -> int:
    """The sum of the tensor's bytes as 64-bit integers: as fast as memory, and changed by any single bit."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    width = torch.int64 if flat.nbytes % 8 == 0 else torch.int32 if flat.nbytes % 4 == 0 else torch.uint8
    return int(flat.view(width).sum(dtype=torch.int64))


# --- file ------------------------------------------------------------------------------------------------------------


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically (see `ml.runtime.tensorfile`). OSError if the system refuses."""
    fields = {
        "format_version": FORMAT_VERSION,
        "origin": asdict(checkpoint.origin),
        "history": [asdict(epoch) for epoch in checkpoint.history],
        "sampler": {"epoch": checkpoint.epoch + 1, "batch": 0},
        "random": {"seed": checkpoint.origin.params["seed"], "epoch": checkpoint.epoch + 1},
        "checksums": {name: checksum(value) for name, value in checkpoint.state.items()},
    }
    tensorfile.write(checkpoint.state, path, _METADATA_KEY, fields)


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; BadCheckpoint for a damaged file, or one that is no checkpoint.

    Tensors are memory-mapped: never write into them. The file may be removed while they are in use.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            fields = json.loads((opened.metadata() or {})[_METADATA_KEY])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        if fields["format_version"] != FORMAT_VERSION:
            raise BadCheckpoint(f"The checkpoint has another format than version {FORMAT_VERSION}.")
        if fields["checksums"] != {name: checksum(value) for name, value in state.items()}:
            raise BadCheckpoint(_NOT_OURS)
        history = tuple(Epoch(**epoch) for epoch in fields["history"])
        return Checkpoint(Origin(**fields["origin"]), history, state)
    except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
        raise BadCheckpoint(_NOT_OURS) from error


def load_resume_checkpoint(plan: CheckpointPlan, origin: Origin) -> Checkpoint | None:
    """The checkpoint to resume from, if any; BadCheckpoint if it is of another training."""
    if plan.resume is None:
        return None
    checkpoint = load(plan.resume)
    checkpoint.raise_unless_from(origin)
    return checkpoint


# --- during a training -----------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes a checkpoint at the end of an epoch if it is due. `history` is the list that the training extends."""

    def __init__(self, plan: CheckpointPlan, origin: Origin, history: Sequence[Epoch], emit: Emit) -> None:
        self._plan, self._origin, self._history, self._emit = plan, origin, history, emit
        self._last = time.monotonic()

    def __call__(self, epoch: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Called after `epoch`; `state` returns the tensors to write."""
        if self._plan.folder is None or time.monotonic() - self._last < self._plan.seconds:
            return
        path = self._plan.folder / f"epoch-{epoch:04}.safetensors"
        started = time.perf_counter()
        try:
            save(Checkpoint(self._origin, tuple(self._history), state()), path)
        except OSError as error:
            # A missing checkpoint only costs time if the training fails later, so it must not fail because of it.
            log.warning(
                "The checkpoint of epoch %d could not be written (%s); the training continues.", epoch, error.strerror
            )
        else:
            self._emit(Checkpointed(epoch, str(path), round(time.perf_counter() - started, 3)))
        self._last = time.monotonic()
