"""The protocol of learners: the part of a network above the cut, as the training loop sees it.

Implementations: `ml.image.learning.vgg_head.VggHeadLearner` for VGG16's large classifier under SGD, and
`ml.image.learning.torch_learner.TorchLearner` for everything else.
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
    """Scans whose gradient is computed at once.

    `rows`: int64 [n], of the window. `labels`: int64 [n]. `share`: weight of the batch's mean loss in the optimizer
    step, 1 / (number of batches in the step). `rate`: learning rate of the step that this batch completes; None if more
    batches belong to the step.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    share: float = 1.0
    rate: float | None = 0.0


@dataclass(frozen=True)
class Criterion:
    """torch's cross-entropy, in nats. `weights`: of classes, float32 [classes]; `smoothing`: Szegedy et al. 2016."""

    weights: torch.Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch."""
        return F.cross_entropy(logits, labels, self.weights, label_smoothing=self.smoothing)

    def partial(self, logits: torch.Tensor, labels: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """The contribution of some scans to the mean loss of their batch; `of`: the labels of the whole batch."""
        total = len(of) if self.weights is None else self.weights[of].sum()
        return F.cross_entropy(logits, labels, self.weights, reduction="sum", label_smoothing=self.smoothing) / total


class Learner(Protocol):
    """Trains layers on features, which come in windows: raw float32 [n, …], whose rows batches refer to."""

    device: torch.device

    @property
    def in_window(self) -> bool:
        """Whether a window is open."""
        ...

    def enter_window(self, features: torch.Tensor) -> None:
        """Open a window. The features of the first one determine the standardization of all windows."""
        ...

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Compute a batch's gradient, and do the step that it completes.

        Returns logits [n, classes] and mean loss, both from before the step.
        """
        ...

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of raw features, without dropout: float32 [n, classes]."""
        ...

    def leave_window(self) -> None:
        """Close the window, so that the weights contain all that was learned."""
        ...

    def weights(self) -> Tensors:
        """The tensors that the logits depend on, by name, not copied."""
        ...

    def set_weights(self, weights: Tensors) -> None:
        """Go back to a copy of earlier `weights`."""
        ...

    def state(self) -> Tensors:
        """The tensors that `restore` needs to continue after an epoch, not copied: write them before the next step."""
        ...

    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """Restore a `state`, given the raw features of the window in which it was read (None: between windows)."""
        ...

    def finish(self) -> None:
        """Leave plain layers that take raw features, on the CPU, in evaluation mode."""
        ...


def strip_prefix(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def add_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors with `prefix` before their names."""
    return {prefix + name: value for name, value in tensors.items()}


def cloned(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Detached copies."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The optimizer's tensors, by parameter name and key."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(value)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: Tensors
) -> None:
    """The inverse of `optimizer_state`."""
    for path, value in state.items():
        name, _, key = path.rpartition(".")
        # Tensors with the parameter's shape are on its device; AdamW's step count stays on the CPU.
        where = parameters[name].device if value.shape == parameters[name].shape else value.device
        optimizer.state[parameters[name]][key] = value.to(where, copy=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
