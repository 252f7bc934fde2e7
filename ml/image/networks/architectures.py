"""The six networks: the one place that knows where each one's blocks, its head and its Grad-CAM layer are.

All are torchvision's, under torchvision's names. Here each is seen as a row of blocks, bottom to top, a pooling, and a
head: `network(x) = head(pool(block(…block(x))))`. Whoever trains cuts that row in two: what is below the cut is frozen
and computed once, what is above it learns. torchvision publishes ImageNet weights for all of them (IMAGENET1K_V1).

| network | paper | parameters | features (pooled) | blocks |
|---|---|---|---|---|
| vgg16 | Simonyan and Zisserman 2015 | 138 M | 25088 = 512 × 7 × 7, or 512 with head gap | 5 |
| resnet18, resnet50 | He et al. 2016 | 12, 26 M | 512, 2048 | 5 |
| inception_v3 | Szegedy et al. 2016 | 25 M | 2048 | 5 |
| efficientnet_b0 | Tan and Le 2019 | 5 M | 1280 | 9 |
| vit_b_16 | Dosovitskiy et al. 2021 | 86 M | 768, the class token | 13 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from ml.image.pixels.transforms import IMAGENET_MEAN, IMAGENET_STD
from ml.runtime.torchvision_import import torchvision

HeadKind = Literal["vgg", "gap"]
HIDDEN = 4096  # of the head that VGG16 came with
MAP_SIDE = 7  # of VGG16's last map as its head wants it

Blocks = Callable[[Any], list[nn.Module]]
Pool = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """One network. `head`: the attribute that holds it. `pooled`: features a scan under head gap. `cam`: the layer
    whose maps Grad-CAM weighs, as a path of attributes. `cells`: pixels from one cell of these maps to the next, and
    the pixel that the first one looks at: the centre of its receptive field. `options`: for torchvision's builder."""

    name: str
    head: str
    pooled: int
    blocks: Blocks
    pool: Pool
    cam: str
    cells: tuple[float, float]
    weights: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_maps(self) -> bool:
        """Whether the last block gives maps; a transformer gives tokens."""
        return self.name != "vit_b_16"

    def features(self, head: HeadKind) -> int:
        """Numbers that a scan's features have under a head."""
        return self.pooled * MAP_SIDE**2 if (self.name, head) == ("vgg16", "vgg") else self.pooled

    def published(self) -> Any:
        """torchvision's entry of the ImageNet weights, with its url."""
        return getattr(torchvision().models, self.weights).IMAGENET1K_V1

    def build(self) -> nn.Module:
        """The network as torchvision makes it, with 1000 outputs and weights by torch's global generator."""
        built: nn.Module = getattr(torchvision().models, self.name)(weights=None, **self.options)
        return built


def make_head(kind: HeadKind, features: int, classes: int, dropout: float) -> nn.Sequential:
    """vgg: Linear 4096, ReLU, Dropout, twice, then a Linear (document 000's head). gap: Dropout and one Linear."""
    if kind == "gap":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))
    hidden = [nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(dropout)]
    hidden += [nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def set_head(network: nn.Module, of: Architecture, kind: HeadKind, classes: int, dropout: float) -> nn.Module:
    """Give the network, in place, a new head of this kind, and the pooling that goes with it."""
    setattr(network, of.head, make_head(kind, of.features(kind), classes, dropout))
    if of.name == "vgg16":
        network.avgpool = nn.AdaptiveAvgPool2d(MAP_SIDE if kind == "vgg" else 1)
    if of.name == "inception_v3":
        network.dropout = nn.Identity()  # ours is in the head
    return network


def cut(network: nn.Module, of: Architecture, top: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The network as two that share its layers: below, all but the `top` uppermost blocks; above, those and the head.

    With `top` 0 the pooling is below, and between the two are [N, features]; else it is whatever the block gives.
    """
    blocks, head = of.blocks(network), network.get_submodule(of.head)
    if top == 0:
        return nn.Sequential(*blocks, of.pool(network)), nn.Sequential(head)
    return nn.Sequential(*blocks[:-top]), nn.Sequential(*blocks[-top:], of.pool(network), head)


# --- the blocks ------------------------------------------------------------------------------------------------------


def _vgg_blocks(network: Any) -> list[nn.Module]:
    ends = (0, 5, 10, 17, 24, 31)  # each block ends with its max-pooling
    return [network.features[start:end] for start, end in pairwise(ends)]


def _resnet_blocks(network: Any) -> list[nn.Module]:
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    return [stem, network.layer1, network.layer2, network.layer3, network.layer4]


def _inception_blocks(network: Any) -> list[nn.Module]:
    groups = (
        ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
        ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
        ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
        ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
        ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
    )
    return [nn.Sequential(*(getattr(network, name) for name in names)) for names in groups]


def _vit_blocks(network: Any) -> list[nn.Module]:
    return [Patches(network), *network.encoder.layers]


def _pooled(network: Any) -> nn.Module:
    return nn.Sequential(network.avgpool, nn.Flatten(1))


class Patches(nn.Module):
    """A vision transformer's way from pictures [N, 3, 224, 224] to tokens [N, 197, 768], the class token first."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.projection = network.conv_proj
        self.class_token, self.positions = network.class_token, network.encoder.pos_embedding

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        # shape[0], not len(): a tracing engine would take the latter for a constant
        patches = self.projection(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        placed: torch.Tensor = tokens + self.positions
        return placed


class ClassToken(nn.Module):
    """The class token, normalized: [N, 197, 768] → [N, 768]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.norm(tokens)[:, 0]  # type: ignore[no-any-return]


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("vgg16", "classifier", 512, _vgg_blocks, _pooled, "features.29", (16, 7.5), "VGG16_Weights"),
        Architecture("resnet18", "fc", 512, _resnet_blocks, _pooled, "layer4", (32, 0), "ResNet18_Weights"),
        Architecture("resnet50", "fc", 2048, _resnet_blocks, _pooled, "layer4", (32, 0), "ResNet50_Weights"),
        Architecture(
            "inception_v3", "fc", 2048, _inception_blocks, _pooled, "Mixed_7c", (32, 37), "Inception_V3_Weights",
            # Its ImageNet weights learned from pixels in [-1, 1], and without the second head of its training.
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), options={"aux_logits": False, "init_weights": True},
        ),
        Architecture(
            "efficientnet_b0", "classifier", 1280, lambda network: list(network.features), _pooled,
            "features.8", (32, 0), "EfficientNet_B0_Weights",
        ),
        Architecture(
            "vit_b_16", "heads", 768, _vit_blocks, lambda network: ClassToken(network.encoder.ln),
            "encoder.layers.encoder_layer_11.ln_1", (16, 7.5), "ViT_B_16_Weights",
        ),
    )
}  # fmt: skip
