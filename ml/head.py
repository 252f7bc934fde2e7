"""The classifier in training, and the state in which an epoch leaves it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ml.params import Params
from ml.span import SpanLinear

SPREAD = 0.3  # std that standardized features are given: a step of SGD grows with |x|² = 25088·SPREAD², and at 1 the
# documented learning rate of 0.01 diverges on scans that a fifth of it would have learned
FLOOR = 0.3  # of the mean std, added in quadrature: a feature that hardly moved in training, but fires on an unseen
# patient, would else be blown up until it drowns the others

Tensors = Mapping[str, torch.Tensor]


class Head:
    """The classifier in training: its first Linear in the span of its inputs (see ml.span), the rest by torch."""

    def __init__(self, network: nn.Module, params: Params) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        classifier = network.get_submodule("classifier").to(self.device)
        self._network, self._standardizes = network, params.standardizes
        self._linear: nn.Linear = classifier[0]  # type: ignore[index]
        self._first = SpanLinear(self._linear, params.learning_rate, params.momentum)
        self._rest: nn.Sequential = classifier[2:]  # type: ignore[index]
        self._optimizer = torch.optim.SGD(
            self._rest.parameters(), params.learning_rate, params.momentum, fused=True
        )  # fmt: skip
        self._mean: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    @property
    def in_window(self) -> bool:
        """Whether a window was entered and not left."""
        return self._first.in_window

    def enter(self, features: torch.Tensor) -> None:
        """Begin a window of raw features [n, 25088]. The first window's mean and std standardize all that follow."""
        features = features.to(self.device)
        if self._standardizes and self._mean is None:
            std, self._mean = torch.std_mean(features, dim=0)
            self._scale = torch.hypot(std, FLOOR * std.mean() + 1e-12) / SPREAD
        self._first.enter(self._standardized(features))

    def learn(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """One step of SGD on rows of the window: their logits and mean loss from before the step."""
        self._rest.train()
        hidden = self._first.forward(rows).requires_grad_()
        logits = self._rest(F.relu(hidden))
        loss = F.cross_entropy(logits, labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        assert hidden.grad is not None
        self._first.step(rows, hidden.grad)
        return logits.detach(), float(loss.detach())

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of raw features [n, 25088], without dropout."""
        self._rest.eval()
        hidden = self._first.outputs(self._standardized(features.to(self.device)))
        return self._rest(F.relu(hidden))  # type: ignore[no-any-return]

    def leave(self, last: bool) -> None:
        """End the window, so that what was learned stands in the weight alone; after the last no momentum is kept."""
        self._first.settle(keep_momentum=not last)

    @torch.no_grad()
    def state(self) -> Tensors:
        """All that it takes to go on from the end of an epoch, by name: weights, momentum, mean and scale.

        These are the living tensors: write them before the next step. 0.1 GB inside the first window, where the first
        Linear is known to whoever has the network and the features; between windows its weight and momentum come along,
        which are 0.8 GB more (see ml.span).
        """
        tensors = {f"first.{name}": value for name, value in self._first.state().items()}
        tensors |= {f"rest.{name}": value for name, value in self._rest.state_dict().items()}
        for name, parameter in self._rest.named_parameters():
            state = self._optimizer.state.get(parameter, {}).items()
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state if torch.is_tensor(value)}
        if self._mean is not None and self._scale is not None:
            tensors |= {"mean": self._mean, "scale": self._scale}
        return tensors

    @torch.no_grad()
    def restore(self, state: Tensors, features: torch.Tensor | None) -> None:
        """Go on from a `state`, given the raw features of the window that it was taken in (None: between windows)."""
        state = {name: value.to(self.device) for name, value in state.items()}
        if "mean" in state:
            self._mean, self._scale = state["mean"].clone(), state["scale"].clone()
        window = None if features is None else self._standardized(features.to(self.device))
        self._first.restore(_below(state, "first."), window)
        self._rest.load_state_dict(_below(state, "rest."))
        parameters = dict(self._rest.named_parameters())
        for path, value in _below(state, "optimizer.").items():
            name, _, key = path.rpartition(".")
            self._optimizer.state[parameters[name]][key] = value.clone()

    @torch.no_grad()
    def finish(self) -> None:
        """Write the span back and fold the standardization: W(x - mean)/scale + b is a Linear of x itself."""
        self._first.settle()
        if self._mean is not None and self._scale is not None:
            self._linear.weight.div_(self._scale)
            self._linear.bias.sub_(self._linear.weight @ self._mean)
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        self._network.cpu().eval()

    def _standardized(self, features: torch.Tensor) -> torch.Tensor:
        if self._mean is None or self._scale is None:
            return features
        return (features - self._mean).div_(self._scale)


def _below(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
