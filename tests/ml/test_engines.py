"""Every engine gives the outputs of the reference, in order, for any batches."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from ml.image.engines.backends import OpenVinoEngine, TorchEngine, open_engine
from ml.image.engines.engine import outputs_of
from ml.image.engines.graphs import activation_ranges, graph_of
from ml.image.engines.hardware import cpu_has_bf16, supported_dtypes
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES, cut
from ml.image.pixels.transforms import Transform
from ml.spec.image import FIXED_SIDE, LEAST_SIDE
from tests.depth import rest_in_full
from tests.ml.builders import LIGHT_NETWORKS, make_scans

SMALL = Transform(64, 64)
CUTS = [("resnet18", 0), *((name, 1) for name in sorted(ARCHITECTURES))]


def make_batch(count: int, side: int = 64) -> np.ndarray:
    return make_scans(count, side)


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def below(vgg) -> nn.Sequential:
    return cut(vgg, ARCHITECTURES["vgg16"], 0)[0]


@pytest.fixture(scope="module")
def reference(below):
    return outputs_of(TorchEngine(below, SMALL, "cpu", "fp32"), make_batch(21))


def test_the_reference_is_the_networks_own_forward(vgg, reference):
    with torch.no_grad():
        maps = vgg.avgpool(vgg.features(SMALL.normalize(torch.from_numpy(make_batch(3)))))
    assert distance(reference[:3], maps.flatten(1).numpy()) < 1e-5


@pytest.mark.parametrize("streams", [1, 2])
def test_openvino_in_fp32_agrees_with_the_reference(below, reference, streams):
    engine = OpenVinoEngine(below, SMALL, "fp32", streams=streams)
    assert engine.streams == streams
    assert distance(outputs_of(engine, make_batch(21)), reference) < 1e-4


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_openvino_in_bf16_agrees_to_its_precision(below, reference):
    assert distance(outputs_of(OpenVinoEngine(below, SMALL, "bf16"), make_batch(21)), reference) < 0.02


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU multiplies no bf16")
def test_torch_in_bf16_agrees_to_its_precision(below, reference):
    assert distance(outputs_of(TorchEngine(below, SMALL, "cpu", "bf16"), make_batch(5)), reference[:5]) < 0.05


@pytest.mark.slow
def test_the_documents_size_agrees_too(below):
    batch, full = make_batch(2, 224), Transform()
    expected = outputs_of(TorchEngine(below, full, "cpu", "fp32"), batch)
    assert expected.shape == (2, 25088)
    assert distance(outputs_of(OpenVinoEngine(below, full, "fp32"), batch), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top"), rest_in_full(CUTS, lambda cut: cut[0] in LIGHT_NETWORKS))
def test_openvino_agrees_on_every_network(name, top):
    side = FIXED_SIDE.get(name, LEAST_SIDE.get(name, 64))
    of, images = ARCHITECTURES[name], make_batch(5, side)
    transform = Transform(side, side, of.mean, of.std)
    built = network.build(2, 0, name, "gap").eval()
    network.calibrate_batch_norms(built, [transform.normalize(torch.from_numpy(images))])
    below, _ = cut(built, of, top)
    expected = outputs_of(TorchEngine(below, transform, "cpu", "fp32"), images)
    ours = outputs_of(OpenVinoEngine(below, transform, "fp32"), images)
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    assert distance(ours, expected) < 1e-3
    alone = outputs_of(OpenVinoEngine(below, transform, "fp32"), images[3:4])
    assert distance(alone, expected[3:4]) < 1e-3


def test_vgg16s_gap_features_are_pooled_in_the_graph(vgg):
    built = network.build(2, 0, "vgg16", "gap").eval()
    below, _ = cut(built, ARCHITECTURES["vgg16"], 0)
    expected = outputs_of(TorchEngine(below, SMALL, "cpu", "fp32"), make_batch(3))
    ours = outputs_of(OpenVinoEngine(below, SMALL, "fp32"), make_batch(3))
    assert ours.shape == (3, 512)
    assert distance(ours, expected) < 1e-4


def test_pictures_that_are_not_square_agree(below):
    transform, batch = Transform(64, 96), np.ascontiguousarray(make_batch(3, 96)[:, :64])
    expected = outputs_of(TorchEngine(below, transform, "cpu", "fp32"), batch)
    assert distance(outputs_of(OpenVinoEngine(below, transform, "fp32"), batch), expected) < 1e-4


def test_without_any_layer_below_the_features_are_the_normalized_pixels():
    batch = make_batch(3)
    expected = SMALL.normalize(torch.from_numpy(batch)).numpy()
    for engine in (TorchEngine(nn.Sequential(), SMALL, "cpu", "fp32"), open_engine(nn.Sequential(), SMALL)):
        assert outputs_of(engine, batch) == pytest.approx(expected, abs=1e-5)


def test_a_whole_network_gives_its_logits(vgg):
    whole = nn.Sequential(*cut(vgg, ARCHITECTURES["vgg16"], 0))
    expected = outputs_of(TorchEngine(whole, SMALL, "cpu", "fp32"), make_batch(5))
    assert expected.shape == (5, 2)
    assert distance(outputs_of(OpenVinoEngine(whole, SMALL, "fp32"), make_batch(5)), expected) < 1e-4


def int8_distance(layers: nn.Sequential, transform: Transform, images: np.ndarray, of: slice) -> float:
    expected = outputs_of(TorchEngine(layers, transform, "cpu", "fp32"), images)
    ranges = activation_ranges(graph_of(layers, transform), images[of])
    assert all(low <= high for low, high in ranges)
    return distance(outputs_of(OpenVinoEngine(layers, transform, "int8", ranges), images), expected)


@pytest.mark.skipif("int8" not in supported_dtypes(), reason="this CPU multiplies no int8")
def test_int8_agrees_to_its_precision_also_on_pictures_that_gave_no_range(below):
    assert int8_distance(below, SMALL, make_batch(21), slice(8)) < 0.1


@pytest.mark.skipif("int8" not in supported_dtypes(), reason="this CPU multiplies no int8")
def test_int8_is_there_for_traced_networks_too():
    of, images = ARCHITECTURES["resnet18"], make_batch(6)
    built = network.build(2, 0, "resnet18", "gap").eval()
    network.calibrate_batch_norms(built, [SMALL.normalize(torch.from_numpy(images))])
    assert int8_distance(nn.Sequential(*cut(built, of, 0)), SMALL, images, slice(None)) < 0.5


def test_ranges_of_another_network_are_refused(below):
    with pytest.raises(ValueError, match="3 ranges for 11 products"):
        OpenVinoEngine(below, SMALL, "int8", [(0.0, 1.0)] * 3)


def test_an_engine_outlives_the_network_that_it_was_made_of():
    built = network.build(2, seed=3).eval()
    whole = nn.Sequential(*cut(built, ARCHITECTURES["vgg16"], 0))
    expected = outputs_of(TorchEngine(whole, SMALL, "cpu", "fp32"), make_batch(3))
    engine = open_engine(whole, SMALL, "fp32")
    del built, whole
    gc.collect()
    others = [np.full(2**20, 7.0, np.float32) for _ in range(500)]  # what was freed is written over
    assert distance(outputs_of(engine, make_batch(3)), expected) < 1e-4
    assert len(others) == 500


def test_odd_batches_come_back_in_order(below, reference):
    engine = open_engine(below, SMALL, "fp32")
    images = make_batch(21)
    parts = list(engine.stream(images[start:end] for start, end in ((0, 1), (1, 8), (8, 9), (9, 21))))
    assert [len(part) for part in parts] == [1, 7, 1, 12]
    assert distance(np.concatenate(parts), reference) < 1e-4


def test_a_stream_that_is_left_early_does_not_spoil_the_next(below, reference):
    engine = open_engine(below, SMALL, "fp32")
    stream = engine.stream(iter(np.array_split(make_batch(21), 7)))
    next(stream)
    stream.close()
    assert distance(outputs_of(engine, make_batch(4)), reference[:4]) < 1e-4
