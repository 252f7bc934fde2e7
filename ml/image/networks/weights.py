"""Where a network's first weights are found: ImageNet's in a folder, in torch's cache or by download, each with its
hash checked. torchvision writes the first eight digits of a file's sha256 into its name (vgg16-397923af.pth).
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


def find_imagenet_weights(of: Architecture, weights_dir: Path | None = None) -> Path:
    """The path of the network's ImageNet weights: in `weights_dir`, in torch's cache, or downloaded into that cache.

    Any file in `weights_dir` with the published name but for the hash serves, if its content has the hash of its name:
    so a site can put its own pretraining there. WeightsMissing says what to put where, and which file is damaged.
    """
    cache, damaged = _cache(of), []
    for place in (*_candidates(of, weights_dir), cache):
        if place.is_file():
            if hash_matches(place):
                return place
            damaged.append(place)
    try:
        fetch(str(of.published().url), cache, max_bytes=MAX_BYTES)
    except DownloadFailed as error:
        raise WeightsMissing(_what_to_do(of, weights_dir, damaged)) from error
    if not hash_matches(cache):
        cache.unlink()
        raise WeightsMissing(_what_to_do(of, weights_dir, [*damaged, cache]))
    return cache


def find_weights_file(name: str, weights_dir: Path | None) -> Path:
    """The path of `weights: file:NAME`: in `weights_dir`, else NAME as a path; WeightsMissing where there is none."""
    for place in (*([weights_dir / name] if weights_dir else []), Path(name)):
        if place.is_file():
            return place
    folder = str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
    raise WeightsMissing(f"weights: there is no file {Path(name).name} in {folder}: put it there, or name another one.")


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_matches(path: Path) -> bool:
    """Whether the content is what the name says; a name without a hash is no weights file of torchvision's."""
    named = _NAMED.match(path.name)
    return named is not None and sha256(path).startswith(named["hash"])


def _cache(of: Architecture) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _file_name(of)


def _file_name(of: Architecture) -> str:
    return str(of.published().url).rpartition("/")[2]


def _candidates(of: Architecture, weights_dir: Path | None) -> Iterator[Path]:
    if weights_dir is None:
        return
    published = _file_name(of)
    yield weights_dir / published
    stem = published.rpartition("-")[0]
    yield from sorted(path for path in weights_dir.glob(f"{stem}-*.pth") if path.name != published)


def _what_to_do(of: Architecture, weights_dir: Path | None, damaged: list[Path]) -> str:
    folder = str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
    torn = "".join(f" The content of {path.name} has not the hash of its name: copy it again." for path in damaged)
    return (
        f"ImageNet weights of {of.name} are in no cache and could not be downloaded: put torchvision's "
        f"{_file_name(of)} into {folder}, or train from scratch with weights: none.{torn}"
    )
