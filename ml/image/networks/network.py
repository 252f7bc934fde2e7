"""Networks: made, begun from weights, saved and loaded.

A model file is a safetensors file of the whole network under torchvision's names (for VGG16 features.*, classifier.*);
its metadata carry architecture, head, classes, transform, params and the engine that computed the features. No pickle
is ever loaded, except state dicts in torchvision's own format, with `weights_only=True`.
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

from ml.image.networks.architectures import ARCHITECTURES, Architecture, HeadKind, cut, set_head
from ml.image.pixels.transforms import Transform
from ml.runtime import tensorfile
from ml.runtime.errors import BadParams, ModelFileError

FORMAT_VERSION = 1
_METADATA_KEY = "renalq"


@dataclass(frozen=True)
class Model:
    """A network with all that it takes to use it: what it is, what it calls its outputs, how it wants its input."""

    network: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    metadata: dict[str, Any] = field(default_factory=dict)
    architecture: str = "vgg16"
    head: HeadKind = "vgg"

    def cut(self, top: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
        """Below and above the `top` uppermost blocks; see `ml.image.networks.architectures.cut`."""
        return cut(self.network, ARCHITECTURES[self.architecture], top)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer that gives the logits."""
        head = cast(nn.Sequential, self.network.get_submodule(ARCHITECTURES[self.architecture].head))
        return cast(nn.Linear, head[-1])


def build(
    classes: int, seed: int, architecture: str = "vgg16", head: HeadKind = "vgg", dropout: float = 0.5
) -> nn.Module:
    """An untrained network, frozen but for its head, with torchvision's own initialization by `seed`.

    VGG16: Kaiming for convolutions, N(0, 0.01) for Linears.
    """
    of = ARCHITECTURES[architecture]
    if architecture != "vgg16":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return freeze(set_head(of.build(), of, head, classes, dropout), of)
    network = _empty(of, head, classes, dropout).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            _initialize(layer, generator)
    return freeze(network, of)


def own_memory(model: Model) -> None:
    """Loaded weights are a map of the file; training writes in place and must never write there."""
    for tensor in (*model.network.parameters(), *model.network.buffers()):
        tensor.data = tensor.data.clone()


def freeze(network: nn.Module, of: Architecture) -> nn.Module:
    """No gradients but for the head."""
    network.requires_grad_(False)
    network.get_submodule(of.head).requires_grad_(True)
    return network


def _empty(of: Architecture, head: HeadKind, classes: int, dropout: float = 0.5) -> nn.Module:
    # On the meta device torch allocates and initializes nothing: 138 million random numbers are not drawn twice.
    with torch.device("meta"):
        return set_head(of.build(), of, head, classes, dropout)


def _initialize(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01, generator=generator)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def calibrate_batch_norms(network: nn.Module, images: Iterable[torch.Tensor]) -> None:
    """Set the batch normalizations of an untrained network to mean and variance of these normalized images, float32
    [n, 3, height, width]. Left at 0 and 1, signals of 60 random layers die out (EfficientNet: 1e-14) or explode.

    Layer by layer would be exact; one pass in training mode comes close, since each layer normalizes by its own batch.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # a plain mean over the batches
    for batch in images if layers else ():
        network(batch)
    for layer in layers:
        layer.eval()


# --- beginning from weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitialWeights:
    """What a network began with: `source` in words, the file's `sha256`, and the `lineage` of the scans it has seen."""

    source: str = "none"
    sha256: str | None = None
    lineage: tuple[str, ...] = ()


def load_published_weights(network: nn.Module, of: Architecture, weights: Path, include_top: bool) -> None:
    """Take ImageNet's backbone from a state dict of torchvision's; with `include_top` VGG16's two hidden layers too."""
    kept = ("classifier.0.", "classifier.3.") if include_top else ()
    _take(network, _backbone_of(read_state_dict(weights), of, kept), of)


def load_file_weights(model: Model, path: Path) -> tuple[str, ...]:
    """Take the weights of a RenalQ model file, head included where it fits, or of a state dict of torchvision's: the
    backbone. Returns the lineage of the scans that these weights have seen.

    BadParams where the file is of another network, ModelFileError where it cannot be read.
    """
    of = ARCHITECTURES[model.architecture]
    if path.suffix in (".pth", ".pt"):
        _take(model.network, _backbone_of(read_state_dict(path), of), of)
        return ()
    theirs = load(path)
    if theirs.architecture != model.architecture:
        raise BadParams(f"weights: they are of {theirs.architecture}, but network is {model.architecture}.")
    same_head = theirs.head == model.head and theirs.classes == model.classes
    state = theirs.network.state_dict()
    _take(model.network, state if same_head else _backbone_of(state, of), of)
    return tuple(theirs.metadata.get("lineage", ()))


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's own format; ModelFileError for a torn file, or one that holds more than tensors."""
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # zipfile, pickle and torch each raise their own
        raise ModelFileError("The weights file is damaged, or not a state dict as torchvision saves it.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelFileError("The weights file is not a state dict as torchvision saves it.")
    return state


def _backbone_of(
    state: Mapping[str, torch.Tensor], of: Architecture, kept: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    dropped = (f"{of.head}.", "AuxLogits.")
    return {name: value for name, value in state.items() if name.startswith(kept) or not name.startswith(dropped)}


def _take(network: nn.Module, state: Mapping[str, torch.Tensor], of: Architecture) -> None:
    wanted = {name for name in network.state_dict() if not name.startswith(f"{of.head}.")}
    missing = {name for name in wanted - state.keys() if not name.endswith("num_batches_tracked")}
    try:
        unexpected = network.load_state_dict(dict(state), strict=False).unexpected_keys
    except RuntimeError as error:  # other shapes
        raise ModelFileError(f"The weights file does not hold the weights of a {of.name}.") from error
    if missing or unexpected:
        raise ModelFileError(f"The weights file does not hold the weights of a {of.name}.")


# --- model files -----------------------------------------------------------------------------------------------------


def save(model: Model, path: Path) -> None:
    """Write a model file at once: a temporary file beside it, fsync, rename. A reader never sees half of one."""
    tensorfile.write(model.network.state_dict(), path, {_METADATA_KEY: json.dumps(_described(model))})


def _described(model: Model) -> dict[str, Any]:
    own = {
        "format_version": FORMAT_VERSION,
        "architecture": model.architecture,
        "head": model.head,
        "classes": list(model.classes),
        "transform": model.transform.as_dict(),
    }
    return {**model.metadata, **own}


def read_metadata(path: Path) -> dict[str, Any]:
    """What a model file says about itself, without reading its weights; ModelFileError for any other file."""
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
    of, head = ARCHITECTURES[metadata["architecture"]], cast(HeadKind, metadata.get("head", "vgg"))
    classes = tuple(str(name) for name in metadata["classes"])
    dropout = float(metadata.get("params", {}).get("dropout", 0.5))
    network = _empty(of, head, len(classes), dropout)
    try:
        with safe_open(path, framework="pt", device=device) as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        network.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"The model file does not hold the weights of a {of.name}.") from error
    transform = Transform.from_dict(metadata["transform"])
    return Model(freeze(network, of).eval(), classes, transform, metadata, of.name, head)
