"""ImageNet's VGG16 as Keras publishes it, converted to torchvision's names, channel order and normalization.

Both are Oxford's weights or trained like them (Simonyan and Zisserman 2015; https://www.robots.ox.ac.uk/~vgg, CC BY
4.0). Keras' network takes blue, green, red from 0 to 255 less the means of `CAFFE_MEAN`; torchvision's takes red,
green, blue as (x / 255 - mean) / std. The first layer is linear, so it can take the difference into itself. At the
border both pad with their own mean colour, which differ by half a grey level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from ml.image.pixels.transforms import IMAGENET_MEAN, IMAGENET_STD
from ml.runtime.errors import ModelFileError

CAFFE_MEAN = (103.939, 116.779, 123.68)
"""Blue, green, red, from 0 to 255 (keras.applications.imagenet_utils, mode "caffe")."""
CONTENT_SHA256 = "6e457f322b1c436c93fe47b24581f9001e547f527128bece44596a12280ed567"
"""Of the converted tensors; see `content_sha256`."""

_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # output channels
_PREFIX = "functional_1/block{}_conv{}_1/"
_WEIGHT, _BIAS = "convolution/ReadVariableOp:0", "Squeeze:0"


def to_torchvision(initializers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The 13 convolutions as `features.N.weight` [out, in, 3, 3] and `features.N.bias` [out], float32.

    `initializers`: those of the ONNX file of a Keras VGG16, under the names of tf2onnx. What else it holds, such as a
    head, is left.

    Raises:
        ModelFileError: a convolution is missing, or has another shape.
    """
    converted: dict[str, np.ndarray] = {}
    at, inputs = 0, 3
    for block, widths in enumerate(_BLOCKS, start=1):
        for number, outputs in enumerate(widths, start=1):
            weight, bias = _convolution(initializers, _PREFIX.format(block, number), (outputs, inputs, 3, 3))
            if at == 0:
                weight, bias = fold_input(weight, bias)
            converted[f"features.{at}.weight"], converted[f"features.{at}.bias"] = weight, bias
            at, inputs = at + 2, outputs  # a ReLU follows each
        at += 1  # and a pooling each block
    return converted


def _convolution(
    initializers: Mapping[str, np.ndarray], prefix: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = initializers.get(prefix + _WEIGHT), initializers.get(prefix + _BIAS)
    if weight is None or bias is None or (weight.shape, bias.shape) != (shape, shape[:1]):
        raise ModelFileError(f"The file does not hold the convolutions of a Keras VGG16: look at {prefix[:-1]}.")
    return weight, bias


def fold_input(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first layer of a network with Keras' input, changed to take torchvision's: weight [out, 3, h, w], bias."""
    weight = weight[:, ::-1].astype(np.float64)
    mean, std = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)
    shift = mean - np.array(CAFFE_MEAN[::-1])
    folded = bias.astype(np.float64) + (weight * shift[:, None, None]).sum((1, 2, 3))
    return (weight * std[:, None, None]).astype(np.float32), folded.astype(np.float32)


def content_sha256(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The SHA-256 of names, shapes and float32 values, in order of names: it knows nothing of the file's format."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()
