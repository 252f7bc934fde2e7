"""Finds initial weights: ImageNet's in a folder, in torch's cache or by download, with a check of their hash.

torchvision puts the first eight digits of a file's SHA-256 into its name (vgg16-397923af.pth). Nothing here loads
torch: a worker's parent process looks for weights too.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from ml.runtime.download import fetch, is_reachable
from ml.runtime.errors import DownloadFailed, WeightsMissing
from ml.spec.pipeline import FILE

SITE = "https://download.pytorch.org/models/"
PUBLISHED = {
    "vgg16": "vgg16-397923af.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "inception_v3": "inception_v3_google-0cc3c7bd.pth",
    "efficientnet_b0": "efficientnet_b0_rwightman-7f5810bc.pth",
    "vit_b_16": "vit_b_16-c867db91.pth",
}
"""torchvision's files of ImageNet weights (IMAGENET1K_V1), by network."""
MAX_BYTES = 2**30
PROBE_SECONDS = 600.0
"""How long the answer holds whether torchvision's site can be reached."""
_NAMED = re.compile(r"^(?P<stem>.+)-(?P<hash>[0-9a-f]{8})\.pth$")


def find_imagenet_weights(network: str, weights_dir: Path | None = None) -> Path:
    """The path of the network's ImageNet weights: in `weights_dir`, in torch's cache, or downloaded into that cache.

    A file in `weights_dir` may have another hash in its name than the published one, as long as its content matches:
    so a site can provide its own pretraining. WeightsMissing says which file to put where, and which one is damaged.
    """
    found, damaged = look_for_imagenet_weights(network, weights_dir)
    if found is not None:
        return found
    cached = cache_folder() / PUBLISHED[network]
    try:
        fetch(SITE + cached.name, cached, max_bytes=MAX_BYTES)
    except DownloadFailed as error:
        raise WeightsMissing(_what_to_do(network, weights_dir, damaged)) from error
    if not hash_matches(cached):
        cached.unlink()
        raise WeightsMissing(_what_to_do(network, weights_dir, [*damaged, cached]))
    return cached


def look_for_imagenet_weights(network: str, weights_dir: Path | None) -> tuple[Path | None, list[Path]]:
    """(the file of the network's ImageNet weights, or None; the files that are damaged), without a download."""
    damaged: list[Path] = []
    for path in (*_candidates(network, weights_dir), cache_folder() / PUBLISHED[network]):
        if path.is_file():
            if hash_matches(path):
                return path, damaged
            damaged.append(path)
    return None, damaged


def find_weights_file(name: str, weights_dir: Path | None) -> Path:
    """The path for `weights: file:NAME`: in `weights_dir`, else NAME itself; WeightsMissing if there is neither."""
    for path in (*([weights_dir / name] if weights_dir else []), Path(name)):
        if path.is_file():
            return path
    raise WeightsMissing(
        f"weights: there is no file {Path(name).name} in {_folder(weights_dir)}: put it there, or name another one."
    )


def readable(weights_dir: Path) -> list[str]:
    """What a training here could begin from: `imagenet:NETWORK`, of whole files or by download, and `file:NAME`."""
    here = {network for network in PUBLISHED if look_for_imagenet_weights(network, weights_dir)[0]}
    there = PUBLISHED if len(here) < len(PUBLISHED) and _can_download(int(time.monotonic() // PROBE_SECONDS)) else ()
    files = sorted(path.name for path in weights_dir.iterdir() if path.is_file()) if weights_dir.is_dir() else []
    names = [name for name in files if not name.startswith(".")]
    return [*(f"imagenet:{network}" for network in sorted({*here, *there})), *(FILE + name for name in names)]


@lru_cache(maxsize=1)
def _can_download(period: int) -> bool:
    """Whether torchvision's site answers; asked once a period, since nobody wants a request every few seconds."""
    return is_reachable(SITE + PUBLISHED["vgg16"])


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; computed again only when the file has changed."""
    state = path.stat()
    return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)


@cache
def _sha256(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_matches(path: Path) -> bool:
    """Whether the content has the hash in the file's name; False for names without a hash."""
    named = _NAMED.match(path.name)
    return named is not None and sha256(path).startswith(named["hash"])


def stem(network: str) -> str:
    """What the names of a network's files begin with, such as vgg16."""
    return PUBLISHED[network].rpartition("-")[0]


def cache_folder() -> Path:
    """Where torch keeps what it downloads: `torch.hub.get_dir()` and `checkpoints`."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    return Path(os.environ.get("TORCH_HOME") or usual).expanduser() / "hub" / "checkpoints"


def _candidates(network: str, weights_dir: Path | None) -> Iterator[Path]:
    if weights_dir is None:
        return
    published = PUBLISHED[network]
    yield weights_dir / published
    yield from sorted(path for path in weights_dir.glob(f"{stem(network)}-*.pth") if path.name != published)


def _what_to_do(network: str, weights_dir: Path | None, damaged: list[Path]) -> str:
    torn = "".join(f" The content of {path.name} has not the hash of its name: copy it again." for path in damaged)
    return (
        f"ImageNet weights of {network} are in no cache and could not be downloaded: `renalq weights fetch {network}` "
        f"on the worker's machine tells more; or put torchvision's {PUBLISHED[network]} into {_folder(weights_dir)}, "
        f"or train from scratch with weights: none.{torn}"
    )


def _folder(weights_dir: Path | None) -> str:
    return str(weights_dir) if weights_dir else "the folder that RENALQ_WEIGHTS_DIR names"
