"""Features to mean 0 and one spread, learned from training scans, and folded into the first Linear at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SPREAD = 0.3  # std that standardized features are given: a step of SGD grows with |x|² = 25088·SPREAD², and at 1 the
# documented learning rate of 0.01 diverges on scans that a fifth of it would have learned
FLOOR = 0.3  # of the mean std, added in quadrature: a feature that hardly moved in training, but fires on an unseen
# patient, would else be blown up until it drowns the others
WIDTH = 25088  # features that SPREAD is made for; with fewer, each may spread more at the same |x|²


class Standardization:
    """(x - mean) / scale, once it was fitted; before that, and where it is off, x itself."""

    def __init__(self, on: bool) -> None:
        self._on = on
        self._mean: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    def fit(self, features: torch.Tensor) -> None:
        """Learn mean and scale from raw features [n, width]; a second call changes nothing."""
        if self._on and self._mean is None:
            std, self._mean = torch.std_mean(features, dim=0)
            spread = min(1.0, SPREAD * (WIDTH / features.shape[1]) ** 0.5)
            self._scale = torch.hypot(std, FLOOR * std.mean() + 1e-12) / spread

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n, width], standardized."""
        if self._mean is None or self._scale is None:
            return features
        return (features - self._mean).div_(self._scale)

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> None:
        """Make `linear` take raw features: W(x - mean)/scale + b is a Linear of x itself."""
        if self._mean is not None and self._scale is not None:
            linear.weight.div_(self._scale)
            linear.bias.sub_(linear.weight @ self._mean)
            self._mean = self._scale = None
            self._on = False

    def state(self) -> dict[str, torch.Tensor]:
        """By name; empty where there is none."""
        return {} if self._mean is None or self._scale is None else {"mean": self._mean, "scale": self._scale}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with a `state`."""
        if "mean" in state:
            self._mean, self._scale = state["mean"].clone(), state["scale"].clone()
