"""The six supported networks: the blocks, head and Grad-CAM layer of each.

All are torchvision's, under torchvision's names. Each is described as a sequence of blocks from bottom to top, a
pooling, and a head: `network(x) = head(pool(block(…block(x))))`. Training cuts this sequence in two: layers below the
cut are frozen and computed once, layers above it learn. torchvision publishes ImageNet weights for all of them
(see `ml.image.networks.weights`).

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
HIDDEN = 4096  # width of the hidden layers of VGG16's own head
MAP_SIDE = 7  # side of VGG16's pooled maps, as its head expects them

Blocks = Callable[[Any], list[nn.Module]]
Pool = Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Architecture:
    """One network.

    `head`: the attribute with the head. `pooled`: features per scan with head gap. `blocks`, `pool`: functions of the
    network. `cam`: the layer whose maps Grad-CAM weights, as a path of attributes. `cells`: distance in pixels between
    cells of these maps, and the centre of the first cell's receptive field. `mean`, `std`: of the input normalization.
    `options`: for torchvision's builder. `gains_by_int8`: whether int8 is faster than bf16; on two cores with VNNI, a
    picture took 71 instead of 135 ms of CPU time in vgg16, 9 instead of 16 in resnet18, 24 instead of 36 in resnet50,
    30 instead of 51 in inception_v3, 102 instead of 176 in vit_b_16, and 8 in both in efficientnet_b0.
    """

    name: str
    head: str
    pooled: int
    blocks: Blocks
    pool: Pool
    cam: str
    cells: tuple[float, float]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    options: dict[str, Any] = field(default_factory=dict)
    gains_by_int8: bool = True

    def features(self, head: HeadKind) -> int:
        """The number of features per scan below a head."""
        return self.pooled * MAP_SIDE**2 if (self.name, head) == ("vgg16", "vgg") else self.pooled

    def build(self) -> nn.Module:
        """The untrained network with 1000 outputs, initialized by torch's global generator."""
        built: nn.Module = getattr(torchvision().models, self.name)(weights=None, **self.options)
        return built


def make_head(kind: HeadKind, features: int, classes: int, dropout: float) -> nn.Sequential:
    """vgg: twice Linear 4096, ReLU, Dropout, then a Linear (the head of document 000). gap: Dropout and one Linear."""
    if kind == "gap":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))
    hidden = [nn.Linear(features, HIDDEN), nn.ReLU(), nn.Dropout(dropout)]
    hidden += [nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def set_head(network: nn.Module, architecture: Architecture, kind: HeadKind, classes: int, dropout: float) -> nn.Module:
    """Replace the network's head, in place, and its pooling accordingly."""
    setattr(network, architecture.head, make_head(kind, architecture.features(kind), classes, dropout))
    if architecture.name == "vgg16":
        network.avgpool = nn.AdaptiveAvgPool2d(MAP_SIDE if kind == "vgg" else 1)
    if architecture.name == "inception_v3":
        network.dropout = nn.Identity()  # the head has its own
    return network


def cut(network: nn.Module, architecture: Architecture, top: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The network in two parts that share its layers, (below, above); above has the `top` uppermost blocks and head.

    With `top` 0 the pooling is below, which outputs [N, features]. Otherwise below outputs what its last block does.
    """
    blocks, head = architecture.blocks(network), network.get_submodule(architecture.head)
    if top == 0:
        return nn.Sequential(*blocks, architecture.pool(network)), nn.Sequential(head)
    return nn.Sequential(*blocks[:-top]), nn.Sequential(*blocks[-top:], architecture.pool(network), head)


# --- blocks ----------------------------------------------------------------------------------------------------------


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
    """The first block of a vision transformer: pictures [N, 3, 224, 224] → tokens [N, 197, 768], class token first."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.projection = network.conv_proj
        self.class_token, self.positions = network.class_token, network.encoder.pos_embedding

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        # shape[0], not len(), which tracing would turn into a constant
        patches = self.projection(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        embedded: torch.Tensor = tokens + self.positions
        return embedded


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
        Architecture("vgg16", "classifier", 512, _vgg_blocks, _pooled, "features.29", (16, 7.5)),
        Architecture("resnet18", "fc", 512, _resnet_blocks, _pooled, "layer4", (32, 0)),
        Architecture("resnet50", "fc", 2048, _resnet_blocks, _pooled, "layer4", (32, 0)),
        Architecture(
            "inception_v3", "fc", 2048, _inception_blocks, _pooled, "Mixed_7c", (32, 37),
            # Its ImageNet weights expect pixels in [-1, 1]; the auxiliary head is only used for training.
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), options={"aux_logits": False, "init_weights": True},
        ),
        Architecture(
            "efficientnet_b0", "classifier", 1280, lambda network: list(network.features), _pooled,
            "features.8", (32, 0), gains_by_int8=False,
        ),
        Architecture(
            "vit_b_16", "heads", 768, _vit_blocks, lambda network: ClassToken(network.encoder.ln),
            "encoder.layers.encoder_layer_11.ln_1", (16, 7.5),
        ),
    )
}  # fmt: skip
