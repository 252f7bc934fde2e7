"""The six networks: blocks, head and Grad-CAM layer of each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from ml.image.networks import network, weights
from ml.image.networks.architectures import ARCHITECTURES, cut
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.torchvision_import import torchvision
from ml.spec.image import FIXED_SIDE, LEAST_SIDE, NETWORKS
from tests.depth import rest_in_full
from tests.ml.builders import LIGHT_NETWORKS, last_linear, make_scans

LIGHT = {*LIGHT_NETWORKS, "efficientnet_b0"}
HEADS = rest_in_full(product(NETWORKS, ("gap", "vgg")), lambda of: of[0] in LIGHT)
CUTS = rest_in_full(product(NETWORKS, ("gap", "vgg"), (0, 1, 2)), lambda cut: cut[0] in LIGHT)


def side_of(name: str) -> int:
    """The smallest images that a network accepts."""
    return FIXED_SIDE.get(name, LEAST_SIDE.get(name, 64))


@cache
def made(name: str, head: str = "gap") -> nn.Module:
    """An untrained network for three classes. Do not change it."""
    return network.build(3, 0, name, head).eval()


@pytest.fixture(autouse=True, scope="module")
def _networks_are_let_go() -> Iterator[None]:
    """At the end of this file: they take gigabytes."""
    yield
    made.cache_clear()


def images_for(name: str, count: int = 2) -> torch.Tensor:
    side = side_of(name)
    return Transform(side, side).normalize(torch.from_numpy(make_scans(count, side)))


def test_there_is_one_for_each_name_that_parameters_know():
    assert set(ARCHITECTURES) == set(NETWORKS)


@pytest.mark.parametrize(("name", "head", "top"), CUTS)
@torch.no_grad()
def test_the_network_is_what_is_above_of_what_is_below(name, head, top):
    of, whole, images = ARCHITECTURES[name], made(name, head), images_for(name)
    below, above = cut(whole, of, top)
    between = below(images)
    if top == 0:
        assert between.shape == (2, of.features(head))
    assert torch.allclose(above(between), whole(images), rtol=1e-4, atol=1e-5)
    assert above(between).shape == (2, 3)


@pytest.mark.parametrize(("name", "head", "top"), CUTS)
def test_a_cut_leaves_no_weight_out_and_none_on_both_sides(name, head, top):
    below, above = cut(made(name, head), ARCHITECTURES[name], top)
    below_ids, above_ids = ({id(one) for one in part.parameters()} for part in (below, above))
    if (name, top) != ("vit_b_16", 0):
        assert not below_ids & above_ids
    assert below_ids | above_ids == {id(one) for one in made(name, head).parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_blocks_can_be_unfrozen(name):
    of = ARCHITECTURES[name]
    blocks = of.blocks(made(name))
    below, above = cut(made(name), of, len(blocks))
    assert len(list(below.parameters())) == 0
    assert len(above) == len(blocks) + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_frozen_part_is_frozen_and_the_head_is_not(name):
    of = ARCHITECTURES[name]
    below, above = cut(made(name), of, 0)
    assert not any(parameter.requires_grad for parameter in below.parameters())
    assert all(parameter.requires_grad for parameter in above.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_torchvisions_but_for_the_head(name):
    of = ARCHITECTURES[name]
    with torch.device("meta"):
        reference = getattr(torchvision().models, name)(weights=None, **of.options)
    ours = {key: value.shape for key, value in made(name).state_dict().items() if not key.startswith(f"{of.head}.")}
    theirs = {key: value.shape for key, value in reference.state_dict().items() if not key.startswith(f"{of.head}.")}
    assert ours == theirs


@pytest.mark.parametrize("name", NETWORKS)
def test_published_weights_and_the_grad_cam_layer_are_there(name):
    of, published = ARCHITECTURES[name], torchvision().models.get_model_weights(name).IMAGENET1K_V1
    assert published.url == weights.SITE + weights.PUBLISHED[name]
    assert isinstance(made(name).get_submodule(of.cam), nn.Module)
    meta = published.transforms()
    assert (tuple(meta.mean), tuple(meta.std)) in {(of.mean, of.std), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"vit_b_16"}))
@torch.no_grad()
def test_the_grad_cam_layer_gives_maps(name):
    seen: list[torch.Size] = []
    hook = made(name).get_submodule(ARCHITECTURES[name].cam).register_forward_hook(
        lambda layer, inputs, output: seen.append(output.shape)
    )  # fmt: skip
    made(name)(images_for(name, 1))
    hook.remove()
    assert [len(shape) for shape in seen] == [4]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_the_heads_are_those_that_parameters_name(name, head):
    layers = list(made(name, head).get_submodule(ARCHITECTURES[name].head))
    kinds = [type(layer).__name__ for layer in layers]
    if head == "gap":
        assert kinds == ["Dropout", "Linear"]
    else:
        assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
        assert [layers[index].out_features for index in (0, 3, 6)] == [4096, 4096, 3]


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "inception_v3", "efficientnet_b0"])
@torch.no_grad()
def test_calibration_gives_features_of_sane_size(name):
    built, images = network.build(2, 0, name, "gap").eval(), images_for(name, 12)
    below, _ = cut(built, ARCHITECTURES[name], 0)
    network.calibrate_batch_norms(built, [images[:6], images[6:]])
    after = below(images)
    assert torch.isfinite(after).all()
    assert 0.01 < float(after.std()) < 100
    assert float(after.std(0).mean()) > 0.005, "pictures are told apart"
    assert not any(layer.training for layer in below.modules() if isinstance(layer, nn.BatchNorm2d))


@torch.no_grad()
def test_without_calibration_efficientnets_signal_dies_out():
    built, images = network.build(2, 0, "efficientnet_b0", "gap").eval(), images_for("efficientnet_b0", 4)
    below, _ = cut(built, ARCHITECTURES["efficientnet_b0"], 0)
    assert float(below(images).std()) < 1e-6


@pytest.mark.parametrize("name", ["vgg16", "vit_b_16"])
def test_networks_without_batch_normalization_are_left_alone(name):
    def never() -> object:
        raise AssertionError("no picture is needed")
        yield

    before = {key: value.clone() for key, value in made(name).state_dict().items()}
    network.calibrate_batch_norms(made(name), never())
    assert all(torch.equal(value, before[key]) for key, value in made(name).state_dict().items())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rest_in_full(NETWORKS, LIGHT.__contains__))
@torch.no_grad()
def test_a_network_comes_back_from_its_file(name, tmp_path):
    side = side_of(name)
    of = ARCHITECTURES[name]
    built = network.build(2, 3, name, "gap", 0.25).eval()
    model = Model(
        built, ("Normal", "Tumor"), Transform(side, side, of.mean, of.std), {"params": {"dropout": 0.25}}, name, "gap"
    )
    network.save(model, tmp_path / "model.safetensors")
    loaded = network.load(tmp_path / "model.safetensors")
    assert (loaded.architecture, loaded.head, loaded.transform) == (name, "gap", model.transform)
    # Not bit by bit: kernels differ by where the weights lie in memory.
    torch.testing.assert_close(loaded.network(images_for(name)), built(images_for(name)), rtol=1e-5, atol=0)
    assert last_linear(loaded).out_features == 2
    assert loaded.network.get_submodule(of.head)[0].p == 0.25
