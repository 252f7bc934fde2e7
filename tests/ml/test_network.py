"""VGG16 and model files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ml.image.networks import network, weights
from ml.image.pixels.transforms import Transform
from ml.runtime.errors import ModelFileError
from ml.runtime.torchvision_import import torchvision
from tests.ml.builders import last_linear


def make_model(net, **metadata) -> network.Model:
    return network.Model(net, ("Normal", "Tumor"), Transform(64, 64), metadata)


def test_the_head_is_document_000s(vgg):
    layers = [type(layer).__name__ for layer in vgg.classifier]
    assert layers == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    shapes = [tuple(vgg.classifier[index].weight.shape) for index in (0, 3, 6)]
    assert shapes == [(4096, 25088), (4096, 4096), (2, 4096)]
    assert vgg.classifier[2].p == 0.5


def test_the_features_are_frozen_and_the_head_is_not(vgg):
    assert not any(parameter.requires_grad for parameter in vgg.features.parameters())
    assert all(parameter.requires_grad for parameter in vgg.classifier.parameters())


def test_names_and_shapes_are_torchvisions(vgg):
    with torch.device("meta"):
        reference = torchvision().models.vgg16(num_classes=2)
    assert {k: v.shape for k, v in vgg.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


def test_initialization_has_torchvisions_spread(vgg):
    assert float(vgg.classifier[3].weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert float(vgg.features[10].weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert float(vgg.classifier[0].bias.detach().abs().max()) == 0


@pytest.mark.parametrize(("name", "layer"), [("vgg16", "features.0"), ("resnet18", "conv1"), ("resnet18", "fc.1")])
def test_the_seed_decides_the_weights(name, layer):
    weights = [network.build(2, seed, name, "gap").get_submodule(layer).weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_building_leaves_the_callers_random_numbers_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network.build(2, 0, name, "gap")
    assert torch.equal(torch.rand(1), expected)


def test_dropout_is_the_parameters():
    assert network.build(2, 0, "resnet18", "gap", 0.2).fc[0].p == 0.2


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_file_gives_back_network_classes_and_transform(vgg, tmp_path):
    network.save(make_model(vgg, engine="torch-fp32"), tmp_path / "model.safetensors")
    loaded = network.load(tmp_path / "model.safetensors")
    assert loaded.classes == ("Normal", "Tumor")
    assert loaded.transform == Transform(64, 64)
    assert loaded.metadata["engine"] == "torch-fp32"
    assert (loaded.architecture, loaded.head) == ("vgg16", "vgg")
    assert all(torch.equal(value, loaded.network.state_dict()[name]) for name, value in vgg.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def make_small(**metadata) -> network.Model:
    net = network.build(2, 0, "resnet18", "gap")
    return network.Model(net, ("Normal", "Tumor"), Transform(64, 64), metadata, "resnet18", "gap")


def test_a_model_of_its_own_memory_can_be_changed_without_its_file(tmp_path):
    path = tmp_path / "model.safetensors"
    network.save(make_small(), path)
    content = path.read_bytes()
    model = network.load(path)
    network.own_memory(model)
    with torch.no_grad():
        for tensor in model.network.state_dict().values():
            tensor.zero_()
    assert path.read_bytes() == content
    assert float(last_linear(network.load(path)).weight.detach().abs().max()) > 0


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        network.save(make_small(engine=object()), path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_models_give_equal_bytes_in_whatever_order_their_metadata_came(tmp_path):
    path, small, found = tmp_path / "model.safetensors", make_small(), set()
    for number in range(12):  # the header of a file with two keys of metadata is written in one of two orders by chance
        fields = {"params": {"seed": 0, "epochs": 2}, "origins": []}
        given = fields if number % 2 else {name: fields[name] for name in reversed(fields)}
        network.save(replace(small, metadata=given), path)
        found.add(weights.sha256(path))
    assert len(found) == 1


def described(**fields: object) -> dict[str, str]:
    own = {"format_version": 1, "classes": ["a", "b"], "transform": Transform().as_dict(), "architecture": "vgg16"}
    return {"renalq": json.dumps({**own, **fields})}


def pickled(path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, path)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, str(path))


def newer(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, str(path), metadata=described(format_version=99))


def unknown(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, str(path), metadata=described(architecture="alexnet"))


def hollow(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, str(path), metadata=described())


def of_other_shapes(path: Path) -> None:
    small = make_small()
    save_file(small.network.state_dict(), str(path), metadata=described(architecture="resnet50", head="gap"))


def torn(path: Path) -> None:
    network.save(make_small(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("write", [pickled, foreign, newer, unknown, hollow, of_other_shapes, torn])
def test_other_files_are_no_models(tmp_path, write):
    write(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError):
        network.load(tmp_path / "model.safetensors")


def test_a_file_of_before_there_were_other_networks_is_a_vgg16s(tmp_path):
    fields = json.loads(described()["renalq"])
    save_file({"weight": torch.zeros(1)}, str(tmp_path / "old.safetensors"), metadata={"renalq": json.dumps(fields)})
    assert network.read_metadata(tmp_path / "old.safetensors")["architecture"] == "vgg16"
