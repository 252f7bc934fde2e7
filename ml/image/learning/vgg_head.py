"""The learner for VGG16's classifier under SGD: span SGD for its first Linear (see ml.image.learning.span_sgd)."""

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
    """See `ml.image.learning.learner.Learner`. `classifier`: Linear, ReLU, then anything; changed in place. `new_head`:
    it has learned nothing yet."""

    def __init__(self, classifier: nn.Sequential, params: Params, criterion: Criterion, new_head: bool = True) -> None:
        self.device = training_device()
        self._classifier, self._criterion = classifier.to(self.device), criterion
        self._linear = cast(nn.Linear, classifier[0])
        self._span = SpanSgdLinear(self._linear, params.momentum, params.weight_decay)
        self._rest = cast(nn.Sequential, classifier[2:])
        self._clip = params.clip_norm
        self._optimizer = torch.optim.SGD(
            self._rest.parameters(), 1.0, params.momentum, weight_decay=params.weight_decay, fused=True
        )
        self._standardize = Standardization(params.standardizes, new_head)

    @property
    def in_window(self) -> bool:
        """See `Learner`."""
        return self._span.in_window

    def enter_window(self, features: torch.Tensor) -> None:
        """See `Learner`."""
        features = features.to(self.device)
        self._standardize.fit(features)
        self._span.enter_window(self._standardize(features))

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """See `Learner`."""
        self._rest.train()
        rows, labels = batch.rows.to(self.device), batch.labels.to(self.device)
        hidden = self._span.forward(rows).requires_grad_()
        logits = self._rest(F.relu(hidden))
        loss = self._criterion(logits, labels)
        (loss if batch.share == 1.0 else loss * batch.share).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        self._span.accumulate(rows, hidden.grad)
        if batch.rate is not None:
            self._step(batch.rate)
        return logits.detach().cpu(), float(loss.detach())

    def _step(self, rate: float) -> None:
        factor = self._clip_factor()
        if factor != 1.0:
            for parameter in self._rest.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.mul_(factor)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._span.step(rate, factor)

    def _clip_factor(self) -> float:
        """The factor that clips all gradients (Pascanu et al. 2013), as in torch's `clip_grad_norm_`."""
        if self._clip is None:
            return 1.0
        squares = [parameter.grad.square().sum() for parameter in self._rest.parameters() if parameter.grad is not None]
        norm = float(torch.stack([self._span.squared_norm(), *squares]).sum().sqrt())
        return min(1.0, self._clip / (norm + 1e-6))

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """See `Learner`."""
        self._rest.eval()
        hidden = self._span.outputs(self._standardize(features.to(self.device)))
        return self._rest(F.relu(hidden)).cpu()  # type: ignore[no-any-return]

    def leave_window(self) -> None:
        """See `Learner`."""
        self._span.close_window(keep_momentum=True)

    @torch.no_grad()
    def weights(self) -> Tensors:
        """See `Learner`."""
        return {**add_prefix("first.", self._span.weights()), **add_prefix("rest.", self._rest.state_dict())}

    @torch.no_grad()
    def set_weights(self, weights: Tensors) -> None:
        """See `Learner`."""
        self._span.set_weights(strip_prefix(weights, "first."))
        self._rest.load_state_dict(strip_prefix(weights, "rest."))

    @torch.no_grad()
    def state(self) -> Tensors:
        """See `Learner`. 0.1 GB in the first window; between windows 0.8 GB more, for the weight and momentum of the
        first Linear (see ml.image.learning.span_sgd).
        """
        parameters = dict(self._rest.named_parameters())
        return {
            **add_prefix("first.", self._span.state()),
            **add_prefix("rest.", self._rest.state_dict()),
            **add_prefix("optimizer.", optimizer_state(self._optimizer, parameters)),
            **self._standardize.state(),
        }

    @torch.no_grad()
    def restore(self, state: Tensors, window: torch.Tensor | None) -> None:
        """See `Learner`."""
        state = {name: value.to(self.device) for name, value in state.items()}
        self._standardize.restore(state)
        inputs = None if window is None else self._standardize(window.to(self.device))
        self._span.restore(strip_prefix(state, "first."), inputs)
        self._rest.load_state_dict(strip_prefix(state, "rest."))
        restore_optimizer(self._optimizer, dict(self._rest.named_parameters()), strip_prefix(state, "optimizer."))

    @torch.no_grad()
    def finish(self) -> None:
        """See `Learner`. Writes the span back and folds the standardization into the first Linear."""
        self._span.close_window()
        self._standardize.fold(self._linear)
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        self._classifier.cpu().eval()
