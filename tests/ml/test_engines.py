"""Every engine gives the reference's features, in order, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ml import network
from ml.architectures import ARCHITECTURES, cut
from ml.engines import OpenVinoBackbone, TorchBackbone, cpu_has_bf16, features_of, open_backbone
from ml.params import FIXED_SIDE, LEAST_SIDE
from ml.transforms import Transform
from tests.ml.builders import make_scans

SMALL = Transform(64, 64)
OTHERS = sorted(set(ARCHITECTURES) - {"vgg16"})


def make_batch(count: int, side: int = 64) -> np.ndarray:
    return make_scans(count, side)


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def below(vgg) -> nn.Sequential:
    return cut(vgg, ARCHITECTURES["vgg16"], 0)[0]


@pytest.fixture(scope="module")
def reference(below):
    return features_of(TorchBackbone(below, SMALL, "cpu", bf16=False), make_batch(21))


def test_the_reference_is_the_networks_own_forward(vgg, reference):
    with torch.no_grad():
        maps = vgg.avgpool(vgg.features(SMALL.normalize(torch.from_numpy(make_batch(3)))))
    assert distance(reference[:3], maps.flatten(1).numpy()) < 1e-5


def test_openvino_in_fp32_agrees_with_the_reference(below, reference):
    assert distance(features_of(OpenVinoBackbone(below, SMALL, bf16=False), make_batch(21)), reference) < 1e-4


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_openvino_in_bf16_agrees_to_its_precision(below, reference):
    assert distance(features_of(OpenVinoBackbone(below, SMALL, bf16=True), make_batch(21)), reference) < 0.02


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_torch_in_bf16_agrees_to_its_precision(below, reference):
    assert distance(features_of(TorchBackbone(below, SMALL, "cpu", bf16=True), make_batch(5)), reference[:5]) < 0.05


@pytest.mark.slow
def test_the_documents_size_agrees_too(below):
    batch, full = make_batch(2, 224), Transform()
    expected = features_of(TorchBackbone(below, full, "cpu", bf16=False), batch)
    assert expected.shape == (2, 25088)
    assert distance(features_of(OpenVinoBackbone(below, full, bf16=False), batch), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top"), [("resnet18", 0), *((name, 1) for name in sorted(ARCHITECTURES))])
def test_openvino_agrees_on_every_network(name, top):
    side = FIXED_SIDE.get(name, LEAST_SIDE.get(name, 64))
    of, images = ARCHITECTURES[name], make_batch(5, side)
    transform = Transform(side, side, of.mean, of.std)
    built = network.build(2, 0, name, "gap").eval()
    network.calibrate(built, [transform.normalize(torch.from_numpy(images))])
    below, _ = cut(built, of, top)
    expected = features_of(TorchBackbone(below, transform, "cpu", bf16=False), images)
    ours = features_of(OpenVinoBackbone(below, transform, bf16=False), images)
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    assert distance(ours, expected) < 1e-3
    alone = features_of(OpenVinoBackbone(below, transform, bf16=False), images[3:4])
    assert distance(alone, expected[3:4]) < 1e-3


def test_vgg16s_gap_features_are_pooled_in_the_graph(vgg):
    built = network.build(2, 0, "vgg16", "gap").eval()
    below, _ = cut(built, ARCHITECTURES["vgg16"], 0)
    expected = features_of(TorchBackbone(below, SMALL, "cpu", bf16=False), make_batch(3))
    ours = features_of(OpenVinoBackbone(below, SMALL, bf16=False), make_batch(3))
    assert ours.shape == (3, 512)
    assert distance(ours, expected) < 1e-4


def test_pictures_that_are_not_square_agree(below):
    transform, batch = Transform(64, 96), np.ascontiguousarray(make_batch(3, 96)[:, :64])
    expected = features_of(TorchBackbone(below, transform, "cpu", bf16=False), batch)
    assert distance(features_of(OpenVinoBackbone(below, transform, bf16=False), batch), expected) < 1e-4


def test_without_any_layer_below_the_features_are_the_normalized_pixels():
    batch = make_batch(3)
    expected = SMALL.normalize(torch.from_numpy(batch)).numpy()
    for backbone in (TorchBackbone(nn.Sequential(), SMALL, "cpu", bf16=False), open_backbone(nn.Sequential(), SMALL)):
        assert features_of(backbone, batch) == pytest.approx(expected, abs=1e-5)


def test_odd_batches_come_back_in_order(below, reference):
    backbone = open_backbone(below, SMALL, "fp32")
    images = make_batch(21)
    parts = list(backbone.stream(images[start:end] for start, end in ((0, 1), (1, 8), (8, 9), (9, 21))))
    assert [len(part) for part in parts] == [1, 7, 1, 12]
    assert distance(np.concatenate(parts), reference) < 1e-4


def test_a_stream_that_is_left_early_does_not_spoil_the_next(below, reference):
    backbone = open_backbone(below, SMALL, "fp32")
    stream = backbone.stream(iter(np.array_split(make_batch(21), 7)))
    next(stream)
    stream.close()
    assert distance(features_of(backbone, make_batch(4)), reference[:4]) < 1e-4
