"""Standardizes features to mean 0 and a fixed spread; folded into the first Linear after training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SPREAD = 0.3
"""Standard deviation of standardized features. The step of SGD grows with |x|² = 25088 · SPREAD²; with a spread of 1,
the documented learning rate of 0.01 diverges on scans that are learned well with a fifth of it."""
FLOOR = 0.3
"""Share of the mean standard deviation that is added in quadrature. Otherwise a feature that is nearly constant in
training, but not for a new patient, would be scaled up until it dominates."""
WIDTH = 25088
"""Number of features that SPREAD is chosen for; fewer features may have a larger spread at the same |x|²."""


PRETRAINED_SPREAD = 1.0
"""The same of large features of pretrained weights: their documented learning rate is a tenth, 0.001."""
LARGE = WIDTH * PRETRAINED_SPREAD**2
"""Mean |x|² above which features count as large. ImageNet's VGG16 has some million: at 0.001 the loss of a new head
rises, to 7 in the first epoch and 26 in the second."""


class Standardization:
    """(x - mean) / scale after `fit`; x itself before that, or if it is off.

    `on`: None leaves it to `fit`, which standardizes large features. `new_head`: nothing above has learned from raw
    features yet. A head that has would not know standardized ones, so for it None means off.
    """

    def __init__(self, on: bool | None, new_head: bool = True) -> None:
        self._on = on if on is not None or new_head else False
        self._mean: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    def fit(self, features: torch.Tensor) -> None:
        """Determine mean and scale from raw features [n, width], if it is on; further calls do nothing."""
        wanted = SPREAD
        if self._on is None:
            wanted = PRETRAINED_SPREAD
            self._on = bool(torch.linalg.vector_norm(features, dim=1).square().mean() > LARGE)
        if self._on and self._mean is None:
            std, self._mean = torch.std_mean(features, dim=0)
            spread = min(1.0, wanted * (WIDTH / features.shape[1]) ** 0.5)
            self._scale = torch.hypot(std, FLOOR * std.mean() + 1e-12) / spread

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n, width], standardized."""
        if self._mean is None or self._scale is None:
            return features
        return (features - self._mean).div_(self._scale)

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> None:
        """Change `linear` to take raw features: W(x - mean)/scale + b is a Linear of x."""
        if self._mean is not None and self._scale is not None:
            linear.weight.div_(self._scale)
            linear.bias.sub_(linear.weight @ self._mean)
            self._mean = self._scale = None
            self._on = False

    def state(self) -> dict[str, torch.Tensor]:
        """Mean and scale by name; empty before `fit`."""
        return {} if self._mean is None or self._scale is None else {"mean": self._mean, "scale": self._scale}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a `state` from after `fit`: without mean and scale it was off."""
        self._on = "mean" in state
        if self._on:
            self._mean, self._scale = state["mean"].clone(), state["scale"].clone()
