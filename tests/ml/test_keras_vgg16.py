"""Keras' VGG16 as torchvision's: names, channel order and normalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ml.image.networks import keras_vgg16
from ml.image.networks.architectures import ARCHITECTURES
from ml.runtime.errors import ModelFileError


def keras_first_layer(picture: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What a convolution says at its only place, as keras.applications.vgg16.preprocess_input has its input: RGB to
    BGR, less 103.939, 116.779, 123.68. picture: uint8 [3, 3, 3], height, width, RGB; weight: [out, BGR, 3, 3]."""
    blue, green, red = picture[..., 2] - 103.939, picture[..., 1] - 116.779, picture[..., 0] - 123.68
    return np.array([(kernel * np.stack([blue, green, red])).sum() for kernel in weight]) + bias


def torchvision_input(picture: np.ndarray) -> np.ndarray:
    """(x / 255 - mean) / std of red, green, blue, [RGB, height, width], as VGG16_Weights.IMAGENET1K_V1 documents it."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((picture / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "picture",
    [
        np.full((3, 3, 3), (255, 0, 0), np.uint8),
        np.full((3, 3, 3), (0, 0, 255), np.uint8),
        np.zeros((3, 3, 3), np.uint8),
        np.random.default_rng(1).integers(0, 256, (3, 3, 3), np.uint8),
    ],
    ids=["red", "blue", "black", "noise"],
)
def test_the_first_layer_says_the_same_of_a_picture(picture: np.ndarray) -> None:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(5, 3, 3, 3)).astype(np.float32), random.normal(size=5).astype(np.float32)
    folded, shifted = keras_vgg16.fold_input(weight, bias)
    said = (folded * torchvision_input(picture)).sum((1, 2, 3)) + shifted
    np.testing.assert_allclose(said, keras_first_layer(picture, weight, bias), rtol=1e-5, atol=2e-3)


def made(scale: float = 0.01) -> dict[str, np.ndarray]:
    """Random convolutions under the ONNX file's names, and a head."""
    random, inputs, tensors = np.random.default_rng(0), 3, {}
    channels = {1: (64, 64), 2: (128, 128), 3: (256,) * 3, 4: (512,) * 3, 5: (512,) * 3}
    for block, widths in channels.items():
        for number, width in enumerate(widths, 1):
            name = f"functional_1/block{block}_conv{number}_1/"
            shape = width, inputs, 3, 3
            tensors[name + "convolution/ReadVariableOp:0"] = random.random(shape, np.float32) * np.float32(scale)
            tensors[name + "Squeeze:0"] = random.random(width, np.float32)
            inputs = width
    return tensors | {"functional_1/dense_1/Cast/ReadVariableOp:0": np.zeros((25088, 64), np.float32)}


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        theirs = ARCHITECTURES["vgg16"].build().features.state_dict()
    converted = keras_vgg16.to_torchvision(made())
    assert {name.removeprefix("features."): value.shape for name, value in converted.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert all(name.startswith("features.") for name in converted)


def test_all_layers_but_the_first_stay_as_they_are() -> None:
    tensors = made()
    converted = keras_vgg16.to_torchvision(tensors)
    np.testing.assert_array_equal(
        converted["features.28.weight"], tensors["functional_1/block5_conv3_1/convolution/ReadVariableOp:0"]
    )
    np.testing.assert_array_equal(converted["features.2.bias"], tensors["functional_1/block1_conv2_1/Squeeze:0"])


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_file_without_all_convolutions_is_refused(change: str) -> None:
    tensors, name = made(), "functional_1/block4_conv2_1/convolution/ReadVariableOp:0"
    tensors[name] = tensors[name][:, :3]
    if change == "missing":
        del tensors[name]
    with pytest.raises(ModelFileError, match="look at functional_1/block4_conv2_1"):
        keras_vgg16.to_torchvision(tensors)


def test_the_contents_hash_tells_names_shapes_and_values_but_no_order() -> None:
    one = {"a": np.ones((2, 3), np.float32), "b": np.zeros(1, np.float32)}
    digest = keras_vgg16.content_sha256(one.items())
    assert keras_vgg16.content_sha256(reversed(one.items())) == digest
    for other in (
        {"c": one["a"], "b": one["b"]}, {"a": one["a"].T, "b": one["b"]}, {"a": one["a"] * 2, "b": one["b"]},
    ):  # fmt: skip
        assert keras_vgg16.content_sha256(other.items()) != digest
