"""One forward pass outputs logits and descriptor, which agree with the plain network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ml.image.engines.admission import whole_network
from ml.image.engines.backends import TorchEngine, open_engine
from ml.image.engines.engine import outputs_of
from ml.image.engines.graphs import activation_ranges, graph_of
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.feature_descriptor import descriptor_width, feature_descriptors, with_descriptor
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.spec.image import LEAST_SIDE
from tests.depth import rest_in_full
from tests.ml.builders import CLASSES, LIGHT_NETWORKS, make_scans

KINDS = [(name, "gap") for name in sorted(ARCHITECTURES)] + [("vgg16", "vgg")]


def make_model(architecture: str, head: str = "gap") -> Model:
    """An untrained model for the smallest pictures that it accepts."""
    of, side = ARCHITECTURES[architecture], 224 if architecture == "vit_b_16" else LEAST_SIDE.get(architecture, 64)
    transform = Transform(side, side, of.mean, of.std)
    made = network.build(2, 0, architecture, head)
    network.calibrate_batch_norms(made, [transform.normalize(torch.from_numpy(make_scans(4, side)))])
    return Model(made.eval(), CLASSES, transform, {}, architecture, head)


@pytest.mark.parametrize(("architecture", "head"), rest_in_full(KINDS, lambda kind: kind[0] in LIGHT_NETWORKS))
def test_the_network_with_descriptor_outputs_logits_and_descriptor(architecture, head):
    model = make_model(architecture, head)
    pictures = make_scans(3, model.transform.height)
    below, above = model.cut()
    features = outputs_of(TorchEngine(below, model.transform, "cpu", "fp32"), pictures)
    with torch.no_grad():
        logits = above.eval()(torch.from_numpy(features)).numpy()
    expected = np.concatenate([logits, feature_descriptors(model, features)], axis=1)
    assert expected.shape == (3, 2 + descriptor_width(model))
    found = outputs_of(open_engine(with_descriptor(model), model.transform, "fp32"), pictures)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", supported_dtypes())
def test_the_descriptor_changes_no_logit(vgg, form):
    model = Model(vgg, CLASSES, Transform(64, 64))
    pictures, ranges = make_scans(5, 64), None
    if form == "int8":
        ranges = activation_ranges(graph_of(with_descriptor(model), model.transform), pictures)
    both = (
        open_engine(layers, model.transform, form, ranges) for layers in (whole_network(model), with_descriptor(model))
    )
    alone, beside = (outputs_of(engine, pictures)[:, :2] for engine in both)
    assert np.linalg.norm(beside - alone) < (1e-4 if form == "fp32" else 0.02) * np.linalg.norm(alone)


@pytest.mark.skipif("bf16" not in supported_dtypes(), reason="this CPU multiplies no bf16")
def test_logits_beside_a_descriptor_are_not_rounded_to_bf16(vgg):
    model = Model(vgg, CLASSES, Transform(64, 64))
    logits = torch.from_numpy(
        outputs_of(open_engine(with_descriptor(model), model.transform, "bf16"), make_scans(5, 64))[:, :2]
    )
    assert (logits.bfloat16().float() != logits).any()


def test_a_descriptor_is_the_mean_of_each_map(vgg):
    model = Model(vgg, CLASSES, Transform(64, 64))
    maps = np.random.default_rng(0).random((2, 512, 7, 7), np.float32)
    np.testing.assert_allclose(feature_descriptors(model, maps.reshape(2, -1)), maps.mean(axis=(2, 3)), rtol=1e-5)
