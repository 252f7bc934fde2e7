"""Finds initial weights: ImageNet's in a folder, in torch's cache or by download, with a check of their hash.

torchvision puts the first eight digits of a file's SHA-256 into its name (vgg16-397923af.pth).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ml.image.networks.architectures import Architecture
from ml.runtime.download import fetch
from ml.runtime.errors import DownloadFailed, WeightsMissing

_NAMED = re.compile(r"^(?P<stem>.+)-(?P<hash>[0-9a-f]{8})\.pth$")
MAX_BYTES = 2**30


def find_imagenet_weights(architecture: Architecture, weights_dir: Path | None = None) -> Path:
    """The path of the network's ImageNet weights: in `weights_dir`, in torch's cache, or downloaded into that cache.

    A file in `weights_dir` may have another hash in its name than the published one, as long as its content matches:
    so a site can provide its own pretraining. WeightsMissing says which file to put where, and which one is damaged.
    """
    cache, damaged = _cache(architecture), []
    for path in (*_candidates(architecture, weights_dir), cache):
        if path.is_file():
            if hash_matches(path):
                return path
            damaged.append(path)
    try:
        fetch(str(architecture.published().url), cache, max_bytes=MAX_BYTES)
    except DownloadFailed as error:
        raise WeightsMissing(_what_to_do(architecture, weights_dir, damaged)) from error
    if not hash_matches(cache):
        cache.unlink()
        raise WeightsMissing(_what_to_do(architecture, weights_dir, [*damaged, cache]))
    return cache


def find_weights_file(name: str, weights_dir: Path | None) -> Path:
    """The path for `weights: file:NAME`: in `weights_dir`, else NAME itself; WeightsMissing if there is neither."""
    for path in (*([weights_dir / name] if weights_dir else []), Path(name)):
        if path.is_file():
            return path
    folder = str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
    raise WeightsMissing(f"weights: there is no file {Path(name).name} in {folder}: put it there, or name another one.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_matches(path: Path) -> bool:
    """Whether the content has the hash in the file's name; False for names without a hash."""
    named = _NAMED.match(path.name)
    return named is not None and sha256(path).startswith(named["hash"])


def _cache(architecture: Architecture) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _file_name(architecture)


def _file_name(architecture: Architecture) -> str:
    return str(architecture.published().url).rpartition("/")[2]


def _candidates(architecture: Architecture, weights_dir: Path | None) -> Iterator[Path]:
    if weights_dir is None:
        return
    published = _file_name(architecture)
    yield weights_dir / published
    stem = published.rpartition("-")[0]
    yield from sorted(path for path in weights_dir.glob(f"{stem}-*.pth") if path.name != published)


def _what_to_do(architecture: Architecture, weights_dir: Path | None, damaged: list[Path]) -> str:
    folder = str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
    torn = "".join(f" The content of {path.name} has not the hash of its name: copy it again." for path in damaged)
    return (
        f"ImageNet weights of {architecture.name} are in no cache and could not be downloaded: put torchvision's "
        f"{_file_name(architecture)} into {folder}, or train from scratch with weights: none.{torn}"
    )
