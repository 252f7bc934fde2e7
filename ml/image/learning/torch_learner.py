"""The learner for any part of a network above the cut, with any optimizer, on one or several devices, by torch.

With several devices (`ml.runtime.process_group`), each process takes its rows of every batch, and torch's
DistributedDataParallel sums the gradients. Scans are weighted by the labels of the whole batch, which each process
knows, so the loss is that of a single process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.image.engines.hardware import device_has_bf16, training_device
from ml.image.learning.learner import (
    Batch,
    Criterion,
    Tensors,
    add_prefix,
    optimizer_state,
    restore_optimizer,
    set_rate,
    strip_prefix,
)
from ml.image.learning.schedules import Phase
from ml.image.learning.standardization import Standardization
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params


class TorchLearner:
    """See `ml.image.learning.learner.Learner`. `above`: the layers to train, changed in place. `new_head`: the head
    among them has learned nothing yet."""

    def __init__(
        self,
        above: nn.Sequential,
        params: Params,
        phase: Phase,
        criterion: Criterion,
        group: ProcessGroup = SINGLE_PROCESS,
        new_head: bool = True,
    ) -> None:
        self.device = group.device() if group.size > 1 else training_device()
        self._above = above.to(self.device).requires_grad_(True)
        self._criterion, self._clip, self._group = criterion, params.clip_norm, group
        self._module: nn.Module = _distributed(self._above) if group.size > 1 else self._above
        self._optimizer = _optimizer(params, list(self._above.parameters()))
        self._standardize = Standardization(params.standardizes if phase.top == 0 else False, new_head)
        self._bf16 = params.precision != "fp32" and (phase.top > 0 or self.device.type == "cuda") and device_has_bf16()
        self._window: torch.Tensor | None = None

    @property
    def in_window(self) -> bool:
        """See `Learner`."""
        return self._window is not None

    def enter_window(self, features: torch.Tensor) -> None:
        """See `Learner`."""
        self._standardize.fit(features)
        self._window = self._standardize(features)

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """See `Learner`. With several devices, the logits are those of this process's rows."""
        assert self._window is not None
        _train_mode(self._above)
        rows = self._group.own_rows(batch.rows)
        labels, share = self._group.own_rows(batch.labels).to(self.device), batch.share * self._group.size
        with self._synchronized(batch.rate is not None):
            with self._autocast():
                logits = self._module(self._window[rows].to(self.device))
            loss = self._criterion.partial(self._as_float(logits), labels, batch.labels.to(self.device))
            (loss * share).backward()  # type: ignore[no-untyped-call]
        if batch.rate is not None:
            self._step(batch.rate)
        return logits.detach().cpu(), float(loss.detach())

    def _step(self, rate: float) -> None:
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._above.parameters(), self._clip)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _synchronized(self, now: bool) -> AbstractContextManager[None]:
        # Batches that do not complete a step only accumulate their gradients locally.
        if now or not isinstance(self._module, DistributedDataParallel):
            return nullcontext()
        return self._module.no_sync()

    def _as_float(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float() if self._bf16 else logits

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            yield

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Learner`."""
        self._above.eval()
        with self._autocast():
            return self._as_float(self._above(self._standardize(features).to(self.device))).cpu()

    def leave_window(self) -> None:
        """See `Learner`."""
        self._window = None

    def weights(self) -> Tensors:
        """See `Learner`."""
        return self._above.state_dict()

    def set_weights(self, weights: Tensors) -> None:
        """See `Learner`."""
        self._above.load_state_dict(dict(weights))

    def state(self) -> Tensors:
        """See `Learner`."""
        parameters = dict(self._above.named_parameters())
        return {
            **add_prefix("above.", self.weights()),
            **add_prefix("optimizer.", optimizer_state(self._optimizer, parameters)),
            **self._standardize.state(),
        }

    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """See `Learner`."""
        self._standardize.restore(state)
        self.set_weights(strip_prefix(state, "above."))
        parameters = dict(self._above.named_parameters())
        restore_optimizer(self._optimizer, parameters, strip_prefix(state, "optimizer."))
        self._window = None if window is None else self._standardize(window)

    def finish(self) -> None:
        """See `Learner`."""
        self._above.cpu().eval()
        linear = next((layer for layer in self._above.modules() if isinstance(layer, nn.Linear)), None)
        if linear is not None:
            self._standardize.fold(linear)
        self._window = None
        self._optimizer.zero_grad()
        self._optimizer.state.clear()


def _optimizer(params: Params, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if params.optimizer == "adamw":
        return torch.optim.AdamW(parameters, 1.0, weight_decay=params.weight_decay, fused=True)
    return torch.optim.SGD(parameters, 1.0, params.momentum, weight_decay=params.weight_decay, fused=True)


def _distributed(above: nn.Module) -> DistributedDataParallel:
    # The buffers are the statistics of batch normalizations, which stay constant.
    return DistributedDataParallel(above, forward_sync_buffers=False)


def _train_mode(above: nn.Module) -> None:
    """Switch dropout on, but keep the statistics of batch normalizations.

    A batch of a few dozen scans is a poor estimate, and the frozen blocks below keep theirs too.
    """
    above.train()
    for layer in above.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
