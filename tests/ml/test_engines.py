"""Every engine gives the reference's features, in order, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ml.engines import OpenVinoBackbone, TorchBackbone, cpu_has_bf16, features_of, open_backbone
from ml.transforms import Transform
from tests.ml.builders import make_pixels

SMALL = Transform(64, 64)


def make_batch(count: int, side: int = 64) -> np.ndarray:
    return np.stack([make_pixels(seed, side, side, bright=seed % 2 == 0) for seed in range(count)])


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def reference(vgg):
    return features_of(TorchBackbone(vgg, SMALL, "cpu", bf16=False), make_batch(21))


def test_the_reference_is_the_networks_own_forward(vgg, reference):
    with torch.no_grad():
        maps = vgg.avgpool(vgg.features(SMALL.normalize(torch.from_numpy(make_batch(3)))))
    assert distance(reference[:3], maps.flatten(1).numpy()) < 1e-5


def test_openvino_in_fp32_agrees_with_the_reference(vgg, reference):
    assert distance(features_of(OpenVinoBackbone(vgg, SMALL, bf16=False), make_batch(21)), reference) < 1e-4


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_openvino_in_bf16_agrees_to_its_precision(vgg, reference):
    assert distance(features_of(OpenVinoBackbone(vgg, SMALL, bf16=True), make_batch(21)), reference) < 0.02


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_torch_in_bf16_agrees_to_its_precision(vgg, reference):
    assert distance(features_of(TorchBackbone(vgg, SMALL, "cpu", bf16=True), make_batch(5)), reference[:5]) < 0.05


def test_the_documents_size_agrees_too(vgg):
    batch, full = make_batch(2, 224), Transform()
    expected = features_of(TorchBackbone(vgg, full, "cpu", bf16=False), batch)
    assert expected.shape == (2, 25088)
    assert distance(features_of(OpenVinoBackbone(vgg, full, bf16=False), batch), expected) < 1e-4


def test_odd_batches_come_back_in_order(vgg, reference):
    backbone = open_backbone(vgg, SMALL, "fp32")
    images = make_batch(21)
    parts = list(backbone.stream(images[start:end] for start, end in ((0, 1), (1, 8), (8, 9), (9, 21))))
    assert [len(part) for part in parts] == [1, 7, 1, 12]
    assert distance(np.concatenate(parts), reference) < 1e-4


def test_a_stream_that_is_left_early_does_not_spoil_the_next(vgg, reference):
    backbone = open_backbone(vgg, SMALL, "fp32")
    stream = backbone.stream(iter(np.array_split(make_batch(21), 7)))
    next(stream)
    stream.close()
    assert distance(features_of(backbone, make_batch(4)), reference[:4]) < 1e-4
