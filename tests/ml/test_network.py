"""VGG16, its weights and its files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ml import network
from ml.errors import ModelFileError, WeightsMissing
from ml.torchvision_ops import torchvision
from ml.transforms import Transform


def make_model(net, **metadata) -> network.Model:
    return network.Model(net, ("Normal", "Tumor"), Transform(64, 64), metadata)


def test_the_weights_that_torchvision_publishes_are_the_file_that_is_looked_for():
    assert network.imagenet_url().endswith(f"/{network.IMAGENET_FILE}")


def test_the_head_is_document_000s(vgg):
    layers = [str(layer) for layer in vgg.classifier]
    assert [layer.split("(")[0] for layer in layers] == [
        "Linear",
        "ReLU",
        "Dropout",
        "Linear",
        "ReLU",
        "Dropout",
        "Linear",
    ]
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


def test_the_seed_decides_the_weights(vgg):
    assert torch.equal(network.build(2, 0).features[0].weight, vgg.features[0].weight)
    assert not torch.equal(network.build(2, 1).features[0].weight, vgg.features[0].weight)


def test_a_model_file_gives_back_network_classes_and_transform(vgg, tmp_path):
    network.save(make_model(vgg, engine="torch-fp32"), tmp_path / "model.safetensors")
    loaded = network.load(tmp_path / "model.safetensors")
    assert loaded.classes == ("Normal", "Tumor")
    assert loaded.transform == Transform(64, 64)
    assert loaded.metadata["engine"] == "torch-fp32"
    assert loaded.metadata["architecture"] == "vgg16"
    assert all(torch.equal(value, loaded.network.state_dict()[name]) for name, value in vgg.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(vgg, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        network.save(make_model(vgg, engine=object()), path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def pickled(path):
    torch.save({"features.0.weight": torch.zeros(1)}, path)


def foreign(path):
    save_file({"weight": torch.zeros(1)}, str(path))


def newer(path):
    save_file({"weight": torch.zeros(1)}, str(path), metadata={"renalq": json.dumps({"format_version": 99})})


def hollow(path):
    described = {"format_version": 1, "classes": ["a", "b"], "transform": Transform().as_dict()}
    save_file({"weight": torch.zeros(1)}, str(path), metadata={"renalq": json.dumps(described)})


@pytest.mark.parametrize("write", [pickled, foreign, newer, hollow])
def test_other_files_are_no_models(tmp_path, write):
    write(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError):
        network.load(tmp_path / "model.safetensors")


def test_weights_with_the_wrong_hash_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "imagenet_url", lambda: "http://127.0.0.1:9/none")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / network.IMAGENET_FILE).write_bytes(b"not the weights")
    with pytest.raises(WeightsMissing, match=f"put torchvision's {network.IMAGENET_FILE} into {tmp_path}"):
        network.imagenet_weights(tmp_path)
