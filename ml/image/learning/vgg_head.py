"""VGG16's classifier under SGD: its first Linear in the span of its inputs (see ml.image.learning.span_sgd), the
rest by torch."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ml.image.engines.hardware import training_device
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
from ml.image.learning.span_sgd import SpanSgdLinear
from ml.image.learning.standardization import Standardization
from ml.spec.image import Params


class VggHeadLearner:
    """See `ml.image.learning.learner.Learner`. `classifier`: Linear, ReLU, then anything; changed in place."""

    def __init__(self, classifier: nn.Sequential, params: Params, criterion: Criterion) -> None:
        self.device = training_device()
        self._classifier, self._criterion = classifier.to(self.device), criterion
        self._linear = cast(nn.Linear, classifier[0])
        self._first = SpanSgdLinear(self._linear, params.momentum, params.weight_decay)
        self._rest = cast(nn.Sequential, classifier[2:])
        self._clip = params.clip_norm
        self._optimizer = torch.optim.SGD(
            self._rest.parameters(), 1.0, params.momentum, weight_decay=params.weight_decay, fused=True
        )
        self._standardized = Standardization(params.standardizes)

    @property
    def in_window(self) -> bool:
        """See `Learner`."""
        return self._first.in_window

    def enter(self, features: torch.Tensor) -> None:
        """See `Learner`."""
        features = features.to(self.device)
        self._standardized.fit(features)
        self._first.enter(self._standardized(features))

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """See `Learner`."""
        self._rest.train()
        rows, labels = batch.rows.to(self.device), batch.labels.to(self.device)
        hidden = self._first.forward(rows).requires_grad_()
        logits = self._rest(F.relu(hidden))
        loss = self._criterion(logits, labels)
        (loss if batch.share == 1.0 else loss * batch.share).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        self._first.gather(rows, hidden.grad)
        if batch.rate is not None:
            self._step(batch.rate)
        return logits.detach().cpu(), float(loss.detach())

    def _step(self, rate: float) -> None:
        factor = self._clipping()
        if factor != 1.0:
            for parameter in self._rest.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.mul_(factor)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._first.step(rate, factor)

    def _clipping(self) -> float:
        """What clipping multiplies all gradients with (Pascanu et al. 2013), as torch's `clip_grad_norm_` has it."""
        if self._clip is None:
            return 1.0
        squares = [parameter.grad.square().sum() for parameter in self._rest.parameters() if parameter.grad is not None]
        norm = float(torch.stack([self._first.squared_norm(), *squares]).sum().sqrt())
        return min(1.0, self._clip / (norm + 1e-6))

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Learner`."""
        self._rest.eval()
        hidden = self._first.outputs(self._standardized(features.to(self.device)))
        return self._rest(F.relu(hidden)).cpu()  # type: ignore[no-any-return]

    def leave(self) -> None:
        """See `Learner`."""
        self._first.settle(keep_momentum=True)

    @torch.no_grad()
    def place(self) -> Tensors:
        """See `Learner`."""
        return {**add_prefix("first.", self._first.place()), **add_prefix("rest.", self._rest.state_dict())}

    @torch.no_grad()
    def put(self, place: Tensors) -> None:
        """See `Learner`."""
        self._first.put(strip_prefix(place, "first."))
        self._rest.load_state_dict(strip_prefix(place, "rest."))

    @torch.no_grad()
    def state(self) -> Tensors:
        """See `Learner`. 0.1 GB inside the first window, where the first Linear is known to whoever has the network and
        the features; between windows its weight and momentum come along, which are 0.8 GB more (see
        ml.image.learning.span_sgd).
        """
        parameters = dict(self._rest.named_parameters())
        return {
            **add_prefix("first.", self._first.state()),
            **add_prefix("rest.", self._rest.state_dict()),
            **add_prefix("optimizer.", optimizer_state(self._optimizer, parameters)),
            **self._standardized.state(),
        }

    @torch.no_grad()
    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """See `Learner`."""
        state = {name: value.to(self.device) for name, value in state.items()}
        self._standardized.restore(state)
        inputs = None if window is None else self._standardized(window.to(self.device))
        self._first.restore(strip_prefix(state, "first."), inputs)
        self._rest.load_state_dict(strip_prefix(state, "rest."))
        restore_optimizer(self._optimizer, dict(self._rest.named_parameters()), strip_prefix(state, "optimizer."))

    @torch.no_grad()
    def finish(self) -> None:
        """See `Learner`: the span is written back, and the standardization folded."""
        self._first.settle()
        self._standardized.fold(self._linear)
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        self._classifier.cpu().eval()
