"""Builds networks, loads initial weights, and reads and writes model files.

A model file is a safetensors file of the whole network under torchvision's names (for VGG16 features.*, classifier.*).
Its metadata contain architecture, head, classes, transform, params and more. Pickles are never loaded, except for state
dicts in torchvision's own format, with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ml.evaluation.positive import indices, of_model
from ml.image.networks.architectures import ARCHITECTURES, Architecture, HeadKind, cut, set_head
from ml.image.pixels.transforms import Transform
from ml.runtime import tensorfile
from ml.runtime.errors import BadParams, ModelFileError

FORMAT_VERSION = 1
_METADATA_KEY = "renalq"
_TOP = ("classifier.0.", "classifier.3.")  # VGG16's hidden layers


@dataclass(frozen=True)
class Model:
    """A network with everything needed to use it: architecture, class names, and the transform of its input."""

    network: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    metadata: dict[str, Any] = field(default_factory=dict)
    architecture: str = "vgg16"
    head: HeadKind = "vgg"

    @property
    def positive(self) -> tuple[str, ...]:
        """The positive classes; none where no class is a finding."""
        return of_model(self.metadata, self.classes)

    @property
    def findings(self) -> list[int]:
        """Indices of the positive classes."""
        return indices(self.classes, self.positive)

    def cut(self, top: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
        """Below and above the `top` uppermost blocks; see `ml.image.networks.architectures.cut`."""
        return cut(self.network, ARCHITECTURES[self.architecture], top)


def build(
    classes: int, seed: int, architecture: str = "vgg16", head: HeadKind = "vgg", dropout: float = 0.5
) -> nn.Module:
    """An untrained network, frozen except for its head, with torchvision's initialization by `seed`.

    For VGG16: Kaiming for convolutions, N(0, 0.01) for Linears.
    """
    chosen = ARCHITECTURES[architecture]
    if architecture != "vgg16":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return freeze(set_head(chosen.build(), chosen, head, classes, dropout), chosen)
    network = _empty(chosen, head, classes, dropout).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            _initialize(layer, generator)
    return freeze(network, chosen)


def own_memory(model: Model) -> None:
    """Copy loaded weights, which are memory-mapped: training writes in place, and must not write into the file."""
    for tensor in (*model.network.parameters(), *model.network.buffers()):
        tensor.data = tensor.data.clone()


def freeze(network: nn.Module, architecture: Architecture) -> nn.Module:
    """Disable gradients except for the head; returns the network."""
    network.requires_grad_(False)
    network.get_submodule(architecture.head).requires_grad_(True)
    return network


def _empty(architecture: Architecture, head: HeadKind, classes: int, dropout: float = 0.5) -> nn.Module:
    # On the meta device torch allocates and initializes nothing, so 138 million random numbers are not drawn twice.
    with torch.device("meta"):
        return set_head(architecture.build(), architecture, head, classes, dropout)


def _initialize(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01, generator=generator)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def calibrate_batch_norms(network: nn.Module, images: Iterable[torch.Tensor]) -> None:
    """Set the batch normalizations of an untrained network by batches of normalized images, float32 [n, 3, h, w].

    With their initial mean 0 and variance 1, signals vanish (EfficientNet: 1e-14) or explode in 60 random layers.
    Setting layer after layer would be exact; one pass in training mode is close, since each layer normalizes by its
    own batch.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the plain mean over all batches
    for batch in images if layers else ():
        network(batch)
    for layer in layers:
        layer.eval()


# --- initial weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights: `source` as in the parameter `weights`, the file's `sha256`, the `lineage` of its scans, and
    `with_head`: whether hidden layers of the head, or all of it, came with them."""

    source: str = "none"
    sha256: str | None = None
    lineage: tuple[str, ...] = ()
    with_head: bool = False


def load_published_weights(network: nn.Module, architecture: Architecture, weights: Path, include_top: bool) -> None:
    """Load the backbone from torchvision's ImageNet state dict; with `include_top` also VGG16's two hidden layers.

    Raises:
        ModelFileError: the file is of another network, or has no hidden layers.
    """
    state = read_state_dict(weights)
    if include_top and not has_top(state):
        raise ModelFileError("The ImageNet weights here have no classifier; include_top needs torchvision's file.")
    _load_state(network, _backbone_of(state, architecture, _TOP if include_top else ()), architecture)


def has_top(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a VGG16's state dict has its two hidden layers. A converted one has convolutions alone."""
    return all(f"{layer}weight" in state for layer in _TOP)


def load_file_weights(model: Model, path: Path) -> tuple[tuple[str, ...], bool]:
    """Load the weights of a RenalQ model file, with the head if it fits, or the backbone of a torchvision state dict.

    Returns the lineage of the scans that these weights have learned from, and whether the head fitted.
    BadParams if the file is of another network, ModelFileError if it cannot be read.
    """
    architecture = ARCHITECTURES[model.architecture]
    if path.suffix in (".pth", ".pt"):
        _load_state(model.network, _backbone_of(read_state_dict(path), architecture), architecture)
        return (), False
    source = load(path)
    if source.architecture != model.architecture:
        raise BadParams(f"weights: they are of {source.architecture}, but network is {model.architecture}.")
    same_head = source.head == model.head and source.classes == model.classes
    state = source.network.state_dict()
    _load_state(model.network, state if same_head else _backbone_of(state, architecture), architecture)
    return tuple(source.metadata.get("lineage", ())), same_head


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's format; ModelFileError for a damaged file, or one with anything but tensors."""
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # zipfile, pickle and torch raise different errors
        raise ModelFileError("The weights file is damaged, or not a state dict as torchvision saves it.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelFileError("The weights file is not a state dict as torchvision saves it.")
    return state


def _backbone_of(
    state: Mapping[str, torch.Tensor], architecture: Architecture, kept: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    dropped = (f"{architecture.head}.", "AuxLogits.")
    return {name: value for name, value in state.items() if name.startswith(kept) or not name.startswith(dropped)}


def _load_state(network: nn.Module, state: Mapping[str, torch.Tensor], architecture: Architecture) -> None:
    required = {name for name in network.state_dict() if not name.startswith(f"{architecture.head}.")}
    missing = {name for name in required - state.keys() if not name.endswith("num_batches_tracked")}
    try:
        unexpected = network.load_state_dict(dict(state), strict=False).unexpected_keys
    except RuntimeError as error:  # different shapes
        raise ModelFileError(f"The weights file does not hold the weights of a {architecture.name}.") from error
    if missing or unexpected:
        raise ModelFileError(f"The weights file does not hold the weights of a {architecture.name}.")


# --- model files -----------------------------------------------------------------------------------------------------


def save(model: Model, path: Path) -> None:
    """Write a model file atomically: to a temporary file, fsync, rename. Equal models give equal bytes."""
    tensorfile.write(model.network.state_dict(), path, _METADATA_KEY, _metadata(model))


def _metadata(model: Model) -> dict[str, Any]:
    own = {
        "format_version": FORMAT_VERSION,
        "architecture": model.architecture,
        "head": model.head,
        "classes": list(model.classes),
        "transform": model.transform.as_dict(),
    }
    return {**model.metadata, **own}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a model file, without its weights; ModelFileError for any other file."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})[_METADATA_KEY])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ModelFileError("The file is not a RenalQ model (safetensors with its classes and transform).") from error
    if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
        raise ModelFileError(f"The model file has another format than version {FORMAT_VERSION}: train it anew.")
    if metadata.get("architecture") not in ARCHITECTURES:
        raise ModelFileError("The model file is of a network that this version does not know.")
    return metadata


def load(path: Path, device: Literal["cpu", "cuda"] = "cpu") -> Model:
    """Read a model file. On the CPU the weights stay mapped from the file until they are first used."""
    metadata = read_metadata(path)
    architecture, head = ARCHITECTURES[metadata["architecture"]], cast(HeadKind, metadata.get("head", "vgg"))
    classes = tuple(str(name) for name in metadata["classes"])
    dropout = float(metadata.get("params", {}).get("dropout", 0.5))
    network = _empty(architecture, head, len(classes), dropout)
    try:
        with safe_open(path, framework="pt", device=device) as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        network.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"The model file does not hold the weights of a {architecture.name}.") from error
    transform = Transform.from_dict(metadata["transform"])
    return Model(freeze(network, architecture).eval(), classes, transform, metadata, architecture.name, head)
