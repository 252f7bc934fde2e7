"""A scan's feature descriptor: the mean of each of the backbone's last feature maps, for OOD detection.

It is computed from the features that the head classifies, at no cost. The network that predicts returns logits and
descriptor side by side in one output, so engines need not know about it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model


class HeadWithDescriptor(nn.Module):
    """Features [N, width] → logits of the head, followed by the descriptor: [N, classes + maps]."""

    def __init__(self, head: nn.Sequential, maps: int) -> None:
        super().__init__()
        self.head, self.maps = head, maps

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        means = features.reshape(features.shape[0], self.maps, -1).mean(2)
        return torch.cat([self.head(features), means], dim=1)


def with_descriptor(model: Model) -> nn.Sequential:
    """The network from normalized pixels to logits and descriptor, [N, classes + maps]."""
    below, above = model.cut()
    return nn.Sequential(below, HeadWithDescriptor(above, descriptor_width(model)))


def feature_descriptors(model: Model, features: np.ndarray) -> np.ndarray:
    """Descriptors, float32 [n, maps], of features [n, width] from below the head."""
    return np.asarray(features.reshape(len(features), descriptor_width(model), -1).mean(axis=2))


def descriptor_width(model: Model) -> int:
    """The length of a descriptor."""
    return ARCHITECTURES[model.architecture].pooled
