"""Any part of a network above the cut, under any optimizer, by torch itself; on one device or on several.

With several (`ml.runtime.process_group`) each process takes its rows of every batch, and torch's
DistributedDataParallel adds the gradients up. What a batch's scans count is reckoned from the labels of the whole
batch, which each process knows: so the loss is that of one process with the whole batch.
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
    """See `ml.image.learning.learner.Learner`. `above`: the layers that learn, changed in place; its first Linear
    takes the features where no block is among them."""

    def __init__(
        self,
        above: nn.Sequential,
        params: Params,
        phase: Phase,
        criterion: Criterion,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.device = group.device() if group.size > 1 else training_device()
        self._above = above.to(self.device).requires_grad_(True)
        self._criterion, self._clip, self._group = criterion, params.clip_norm, group
        self._module: nn.Module = _in_step(self._above) if group.size > 1 else self._above
        self._optimizer = _optimizer(params, list(self._above.parameters()))
        self._standardized = Standardization(params.standardizes and phase.top == 0)
        self._low = params.precision != "fp32" and (phase.top > 0 or self.device.type == "cuda") and device_has_bf16()
        self._window: torch.Tensor | None = None

    @property
    def in_window(self) -> bool:
        """See `Learner`."""
        return self._window is not None

    def enter(self, features: torch.Tensor) -> None:
        """See `Learner`."""
        self._standardized.fit(features)
        self._window = self._standardized(features)

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """See `Learner`. With several devices the logits are those of this process' rows."""
        assert self._window is not None
        _learning_mode(self._above)
        mine = self._group.own_rows(batch.rows)
        labels, share = self._group.own_rows(batch.labels).to(self.device), batch.share * self._group.size
        with self._synchronizing(batch.rate is not None):
            with self._casting():
                logits = self._module(self._window[mine].to(self.device))
            loss = self._criterion.part(self._wide(logits), labels, batch.labels.to(self.device))
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

    def _synchronizing(self, now: bool) -> AbstractContextManager[None]:
        # Gradients of batches that complete no step are added up at home first.
        if now or not isinstance(self._module, DistributedDataParallel):
            return nullcontext()
        return self._module.no_sync()

    def _wide(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float() if self._low else logits

    @contextmanager
    def _casting(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
            yield

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Learner`."""
        self._above.eval()
        with self._casting():
            return self._wide(self._above(self._standardized(features).to(self.device))).cpu()

    def leave(self) -> None:
        """See `Learner`."""
        self._window = None

    def place(self) -> Tensors:
        """See `Learner`."""
        return self._above.state_dict()

    def put(self, place: Tensors) -> None:
        """See `Learner`."""
        self._above.load_state_dict(dict(place))

    def state(self) -> Tensors:
        """See `Learner`."""
        parameters = dict(self._above.named_parameters())
        return {
            **add_prefix("above.", self.place()),
            **add_prefix("optimizer.", optimizer_state(self._optimizer, parameters)),
            **self._standardized.state(),
        }

    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """See `Learner`."""
        self._standardized.restore(state)
        self.put(strip_prefix(state, "above."))
        parameters = dict(self._above.named_parameters())
        restore_optimizer(self._optimizer, parameters, strip_prefix(state, "optimizer."))
        self._window = None if window is None else self._standardized(window)

    def finish(self) -> None:
        """See `Learner`."""
        self._above.cpu().eval()
        linear = next((layer for layer in self._above.modules() if isinstance(layer, nn.Linear)), None)
        if linear is not None:
            self._standardized.fold(linear)
        self._window = None
        self._optimizer.zero_grad()
        self._optimizer.state.clear()


def _optimizer(params: Params, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if params.optimizer == "adamw":
        return torch.optim.AdamW(parameters, 1.0, weight_decay=params.weight_decay, fused=True)
    return torch.optim.SGD(parameters, 1.0, params.momentum, weight_decay=params.weight_decay, fused=True)


def _in_step(above: nn.Module) -> DistributedDataParallel:
    # The buffers are statistics of batch normalizations, which do not move.
    return DistributedDataParallel(above, forward_sync_buffers=False)


def _learning_mode(above: nn.Module) -> None:
    """Dropout on. Batch normalizations keep the statistics that they came with: a few dozen scans a step are a poor
    estimate, and the frozen blocks below have theirs from elsewhere."""
    above.train()
    for layer in above.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
