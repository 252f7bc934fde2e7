"""What learns: the part of a network above the cut, and what a training loop asks of it.

Two kinds stand behind this: `ml.image.learning.vgg_head.VggHeadLearner`, VGG16's large classifier under SGD, by the span of
its inputs; and `ml.image.learning.torch_learner.TorchLearner`, everything else, by torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Scans whose gradient is computed at once. `rows`: int64, of the window; `labels`: int64; `share`: what its mean
    loss counts in the step (1 over the number of batches in it); `rate`: learning rate of the step that this batch
    completes, None where more batches belong to it."""

    rows: torch.Tensor
    labels: torch.Tensor
    share: float = 1.0
    rate: float | None = 0.0


@dataclass(frozen=True)
class Criterion:
    """Cross-entropy, weighted by class (float32 [classes]) and smoothed (Szegedy et al. 2016), as torch has it."""

    weights: torch.Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        return F.cross_entropy(logits, labels, self.weights, label_smoothing=self.smoothing)

    def part(self, logits: torch.Tensor, labels: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """What some of a batch's scans add to its mean loss; `of`: the labels of the whole batch."""
        total = len(of) if self.weights is None else self.weights[of].sum()
        return F.cross_entropy(logits, labels, self.weights, reduction="sum", label_smoothing=self.smoothing) / total


class Learner(Protocol):
    """What a training loop asks of it. Features come in windows: raw float32 [n, …], whose rows the batches name."""

    device: torch.device

    @property
    def in_window(self) -> bool:
        """Whether a window was entered and not left."""
        ...

    def enter(self, features: torch.Tensor) -> None:
        """Begin a window. The first one's mean and std standardize all that follow."""
        ...

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Take a batch's gradient, and the step that it completes: logits [n, classes] and mean loss from before it."""
        ...

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of raw features, without dropout: float32 [n, classes]."""
        ...

    def leave(self) -> None:
        """End the window, so that what was learned stands in the weights alone."""
        ...

    def place(self) -> Tensors:
        """What the logits depend on, by name: living tensors, not copies."""
        ...

    def put(self, place: Tensors) -> None:
        """Go back to a copy of a `place`."""
        ...

    def state(self) -> Tensors:
        """All that it takes to go on from the end of an epoch: living tensors; write them before the next step."""
        ...

    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """Go on from a `state`, given the raw features of the window that it was taken in (None: between windows)."""
        ...

    def finish(self) -> None:
        """Leave a plain network that takes raw features, on the CPU, in evaluation mode."""
        ...


def strip_prefix(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def add_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors with `prefix` before their names."""
    return {prefix + name: value for name, value in tensors.items()}


def cloned(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Copies that stay as they are."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The optimizer's tensors by parameter name and key."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(value)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: Tensors
) -> None:
    """The reverse of `optimizer_state`."""
    for path, value in state.items():
        name, _, key = path.rpartition(".")
        # A tensor of the parameter's form lives where the parameter does; AdamW's count of steps stays on the CPU.
        where = parameters[name].device if value.shape == parameters[name].shape else value.device
        optimizer.state[parameters[name]][key] = value.to(where, copy=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
