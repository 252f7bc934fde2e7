"""A scan's descriptor: what the network's backbone says of it, one number for each of its last maps.

It costs nothing: the features that the head decides by are averaged over each map. So the network that is served gives
logits and descriptor side by side in one answer, and no engine needs to know of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model


class Described(nn.Module):
    """Features [N, width] → the logits of a head, and behind them the descriptor: [N, classes + maps]."""

    def __init__(self, head: nn.Sequential, maps: int) -> None:
        super().__init__()
        self.head, self.maps = head, maps

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        means = features.reshape(features.shape[0], self.maps, -1).mean(2)
        return torch.cat([self.head(features), means], dim=1)


def served(model: Model) -> nn.Sequential:
    """The network from normalized pixels to logits and descriptor."""
    below, above = model.cut()
    return nn.Sequential(below, Described(above, maps_of(model)))


def descriptors_of(model: Model, features: np.ndarray) -> np.ndarray:
    """Descriptors float32 [n, maps] of features [n, width] below the head."""
    return np.asarray(features.reshape(len(features), maps_of(model), -1).mean(axis=2))


def maps_of(model: Model) -> int:
    """How many numbers a descriptor has."""
    return ARCHITECTURES[model.architecture].pooled
