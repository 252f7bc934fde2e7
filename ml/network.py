"""VGG16 as document 000 has it: frozen features, and a head 25088 → 4096 → 4096 → classes with ReLU and Dropout 0.5.

A model file is a safetensors file of the whole network under torchvision's names (features.*, classifier.*); its
metadata carry classes, transform, params and the engine that computed the features. No pickle is ever loaded, except
torchvision's own published .pth, with `weights_only=True` and its published hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ml import tensorfile
from ml.download import fetch
from ml.errors import DownloadFailed, ModelFileError, WeightsMissing
from ml.torchvision_ops import torchvision
from ml.transforms import Transform

FORMAT_VERSION = 1
FEATURES = 25088  # 512 × 7 × 7 after adaptive average pooling
HIDDEN = 4096
IMAGENET_FILE = "vgg16-397923af.pth"
IMAGENET_HASH = "397923af"  # the start of its sha256, as torchvision publishes it in the name
_METADATA_KEY = "renalq"


@dataclass(frozen=True)
class Model:
    """A network with all that it takes to use it: what it calls its outputs, and how it wants its input."""

    network: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    metadata: dict[str, Any] = field(default_factory=dict)


def build(classes: int, seed: int) -> nn.Module:
    """A VGG16 with torchvision's own initialization (Kaiming for convolutions, N(0, 0.01) for Linears), by `seed`."""
    network = _empty(classes)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            _initialize(layer, generator)
    return freeze(network)


def build_imagenet(classes: int, seed: int, include_top: bool, weights: Path) -> nn.Module:
    """ImageNet's features under a new head; `include_top` keeps ImageNet's two hidden layers, not the last."""
    network = build(classes, seed)
    state = torch.load(weights, weights_only=True, mmap=True, map_location="cpu")
    kept = ("features.", "classifier.0.", "classifier.3.") if include_top else ("features.",)
    network.load_state_dict({name: value for name, value in state.items() if name.startswith(kept)}, strict=False)
    return network


def freeze(network: nn.Module) -> nn.Module:
    """No gradients for the features; the classifier keeps its own."""
    for parameter in network.get_submodule("features").parameters():
        parameter.requires_grad = False
    return network


def _empty(classes: int) -> nn.Module:
    # On the meta device torch allocates and initializes nothing: 138 million random numbers are not drawn twice.
    with torch.device("meta"):
        network: nn.Module = torchvision().models.vgg16(weights=None, init_weights=False, num_classes=classes)
    return network


def _initialize(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01, generator=generator)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- ImageNet weights ------------------------------------------------------------------------------------------------


def imagenet_weights(weights_dir: Path | None = None) -> Path:
    """The path of torchvision's VGG16 weights: from `weights_dir`, from torch's cache, or downloaded into that cache.

    WeightsMissing says what to put where.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_FILE
    places = [folder / IMAGENET_FILE for folder in (weights_dir,) if folder] + [cache]
    for place in places:
        if place.is_file() and _hash_matches(place):
            return place
    try:
        fetch(imagenet_url(), cache, max_bytes=2**30)
    except DownloadFailed as error:
        raise WeightsMissing(_where_to_put(weights_dir)) from error
    if not _hash_matches(cache):
        cache.unlink()
        raise WeightsMissing(_where_to_put(weights_dir))
    return cache


def imagenet_url() -> str:
    """Where torchvision publishes them."""
    return str(torchvision().models.VGG16_Weights.IMAGENET1K_V1.url)


def _where_to_put(weights_dir: Path | None) -> str:
    folder = str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
    return (
        f"ImageNet weights are in no cache and could not be downloaded: put torchvision's {IMAGENET_FILE} "
        f"into {folder}, or train from scratch with weights: none."
    )


def _hash_matches(path: Path) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(IMAGENET_HASH)


# --- model files -----------------------------------------------------------------------------------------------------


def save(model: Model, path: Path) -> None:
    """Write a model file at once: a temporary file beside it, fsync, rename. A reader never sees half of one."""
    tensorfile.write(model.network.state_dict(), path, {_METADATA_KEY: json.dumps(_described(model))})


def _described(model: Model) -> dict[str, Any]:
    own = {
        "format_version": FORMAT_VERSION,
        "architecture": "vgg16",
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
    return metadata


def load(path: Path, device: Literal["cpu", "cuda"] = "cpu") -> Model:
    """Read a model file. On the CPU the weights stay mapped from the file until they are first used."""
    metadata = read_metadata(path)
    classes = tuple(str(name) for name in metadata["classes"])
    network = _empty(len(classes))
    try:
        with safe_open(path, framework="pt", device=device) as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        network.load_state_dict(state, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ModelFileError("The model file does not hold the weights of a VGG16.") from error
    return Model(freeze(network).eval(), classes, Transform.from_dict(metadata["transform"]), metadata)
