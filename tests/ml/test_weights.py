"""Initial weights. Files are created here in torchvision's format; nothing is downloaded."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ml.image.networks import network, weights
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.errors import BadParams, DownloadFailed, ModelFileError, WeightsMissing, as_pipeline_error
from tests.ml.builders import CLASSES

NET = "resnet18"
RESNET = ARCHITECTURES[NET]
PUBLISHED = "resnet18-f37072fd.pth"


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path) -> list[str]:
    """Records downloads instead of doing them, with a torch cache of its own."""
    asked: list[str] = []

    def refuse(url: str, target: Path, max_bytes: int = 0, report: object = None) -> None:
        asked.append(url)
        raise DownloadFailed("source_url: the server cannot be reached (ConnectionError).")

    monkeypatch.setattr(weights, "fetch", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return asked


def make_published(name: str = "resnet18", seed: int = 1) -> nn.Module:
    """A torchvision network with 1000 outputs."""
    torch.manual_seed(seed)
    return ARCHITECTURES[name].build()


def put(state: object, folder: Path, stem: str = "resnet18") -> Path:
    """A state dict with a file name like torchvision's, with its own hash."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "partial"
    torch.save(state, partial)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    return partial.rename(folder / f"{stem}-{digest[:8]}.pth")


def make_model(name: str = "resnet18", head: str = "gap") -> Model:
    return Model(network.build(2, 0, name, head), CLASSES, Transform(64, 64), {}, name, head)


def test_the_file_that_is_looked_for_is_the_one_that_torchvision_publishes(downloads, tmp_path):
    with pytest.raises(WeightsMissing, match=PUBLISHED):
        weights.find_imagenet_weights(NET, tmp_path)
    assert downloads == [f"https://download.pytorch.org/models/{PUBLISHED}"]


def test_a_sites_own_file_with_its_hash_is_taken_and_nothing_is_downloaded(downloads, tmp_path):
    published = make_published()
    path = put(published.state_dict(), tmp_path / "weights")
    found = weights.find_imagenet_weights(NET, tmp_path / "weights")
    assert found == path
    model = make_model()
    before = {name: value.clone() for name, value in model.network.fc.state_dict().items()}
    network.load_published_weights(model.network, RESNET, found, include_top=False)
    for name, value in published.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(model.network.state_dict()[name], value), name
    assert all(torch.equal(value, before[name]) for name, value in model.network.fc.state_dict().items())
    assert not any(value.requires_grad for name, value in model.network.named_parameters() if "fc" not in name)
    assert downloads == []


def test_torchs_own_cache_is_looked_into_too(tmp_path, monkeypatch, downloads):
    monkeypatch.setattr(weights, "hash_matches", lambda path: True)  # the published content is not here
    cached = tmp_path / "torch" / "hub" / "checkpoints" / PUBLISHED
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    assert weights.find_imagenet_weights(NET) == cached
    assert downloads == []


def test_a_download_lands_in_torchs_cache_and_is_checked(tmp_path, monkeypatch):
    def fetch(url: str, target: Path, max_bytes: int) -> None:
        target.parent.mkdir(parents=True)
        target.write_bytes(b"another file")

    monkeypatch.setattr(weights, "fetch", fetch)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / PUBLISHED
    with pytest.raises(WeightsMissing, match=rf"content of {PUBLISHED} has not the hash"):
        weights.find_imagenet_weights(NET)
    assert not cached.exists()


def test_a_file_with_the_wrong_hash_is_named(tmp_path):
    path = put(make_published().state_dict(), tmp_path)
    wrong = path.rename(tmp_path / "resnet18-00000000.pth")
    with pytest.raises(WeightsMissing, match=rf"put torchvision's {PUBLISHED} into .*{wrong.name} has not the hash"):
        weights.find_imagenet_weights(NET, tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    path = put(make_published().state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsMissing, match=rf"content of {path.name} has not the hash of its name: copy it again"):
        weights.find_imagenet_weights(NET, tmp_path)


def test_a_good_file_is_found_beside_a_damaged_one(tmp_path):
    (tmp_path / "resnet18-00000000.pth").write_bytes(b"torn")
    path = put(make_published().state_dict(), tmp_path)
    assert weights.find_imagenet_weights(NET, tmp_path) == path


def test_files_of_other_networks_are_not_looked_at(tmp_path):
    put(make_published("resnet50").state_dict(), tmp_path, "resnet50")
    with pytest.raises(WeightsMissing, match="of resnet18 are in no cache"):
        weights.find_imagenet_weights(NET, tmp_path)


# --- what is in the file ---------------------------------------------------------------------------------------------


def test_weights_of_another_network_are_refused(tmp_path):
    path = put(make_published("efficientnet_b0").state_dict(), tmp_path)
    with pytest.raises(ModelFileError, match="does not hold the weights of a resnet18"):
        network.load_published_weights(make_model().network, RESNET, path, include_top=False)


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_weights_of_other_shapes_or_with_some_missing_are_refused(tmp_path, name):
    state = dict(make_published(name).state_dict())
    if name == "resnet18":
        del state["layer4.1.conv2.weight"]
    path = put(state, tmp_path)
    with pytest.raises(ModelFileError, match="does not hold the weights of a resnet18"):
        network.load_published_weights(make_model().network, RESNET, path, include_top=False)


class Spy:
    """Code in a pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_code_in_a_pickle_is_not_run(tmp_path, form):
    path, trace = tmp_path / "resnet18-00000000.pth", tmp_path / "trace"
    torch.save({"fc.weight": Spy(trace)}, path) if form == "torch" else path.write_bytes(pickle.dumps(Spy(trace)))
    with pytest.raises(ModelFileError, match="damaged, or not a state dict"):
        network.read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"weight": [1, 2]}, torch.zeros(2)])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    with pytest.raises(ModelFileError, match="not a state dict"):
        network.read_state_dict(put(content, tmp_path))


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = put(make_published().state_dict(), tmp_path)
    path.write_bytes(damage or path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelFileError, match="damaged"):
        network.read_state_dict(path)


def test_an_error_about_weights_reaches_the_user_as_one_of_their_parameters():
    error = as_pipeline_error(ModelFileError("The weights file is damaged."))
    assert error.code == "BAD_PARAMS"
    assert "The weights file is damaged." in str(error)


# --- weights: file: --------------------------------------------------------------------------------------------------


def test_a_file_is_found_in_the_folder_or_by_its_path(tmp_path):
    (tmp_path / "weights").mkdir()
    inside, outside = tmp_path / "weights" / "a.safetensors", tmp_path / "b.safetensors"
    inside.write_bytes(b"a"), outside.write_bytes(b"b")
    assert weights.find_weights_file("a.safetensors", tmp_path / "weights") == inside
    assert weights.find_weights_file(str(outside), tmp_path / "weights") == outside
    assert weights.find_weights_file(str(outside), None) == outside


@pytest.mark.parametrize("folder", [True, False])
def test_a_missing_file_says_where_to_put_it(tmp_path, folder):
    where = str(tmp_path) if folder else "RENALQ_WEIGHTS_DIR"
    with pytest.raises(WeightsMissing, match=rf"no file c\.safetensors in .*{where}.*: put it there"):
        weights.find_weights_file("secret/c.safetensors", tmp_path if folder else None)


def test_a_model_of_ours_gives_backbone_head_and_lineage(tmp_path):
    theirs = make_model()
    nn.init.ones_(theirs.network.fc[1].weight)
    kept = Model(theirs.network, CLASSES, theirs.transform, {"lineage": ["p", "q"]}, "resnet18", "gap")
    network.save(kept, tmp_path / "model.safetensors")
    model = Model(network.build(2, 5, "resnet18", "gap"), CLASSES, Transform(64, 64), {}, "resnet18", "gap")
    assert network.load_file_weights(model, tmp_path / "model.safetensors") == (("p", "q"), True)
    state, expected = model.network.state_dict(), theirs.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


def test_a_model_of_other_classes_gives_its_backbone_alone(tmp_path):
    network.save(make_model(), tmp_path / "model.safetensors")
    four = network.build(4, 5, "resnet18", "gap")
    before = four.fc[1].weight.detach().clone()
    model = Model(four, ("Cyst", "Normal", "Stone", "Tumor"), Transform(64, 64), {}, "resnet18", "gap")
    network.load_file_weights(model, tmp_path / "model.safetensors")
    assert torch.equal(four.conv1.weight, make_model().network.conv1.weight)
    assert torch.equal(four.fc[1].weight, before)


def test_a_model_of_another_network_is_a_wrong_parameter(tmp_path):
    network.save(make_model(), tmp_path / "model.safetensors")
    with pytest.raises(BadParams, match=r"^weights: they are of resnet18, but network is efficientnet_b0"):
        network.load_file_weights(make_model("efficientnet_b0"), tmp_path / "model.safetensors")


def test_a_state_dict_of_torchvisions_can_be_named_as_a_file(tmp_path):
    published = make_published()
    torch.save(published.state_dict(), tmp_path / "own.pth")
    model = make_model()
    assert network.load_file_weights(model, tmp_path / "own.pth") == ((), False)
    assert torch.equal(model.network.layer4[1].conv2.weight, published.layer4[1].conv2.weight)


@pytest.mark.slow
def test_include_top_takes_vgg16s_hidden_layers(tmp_path):
    of = ARCHITECTURES["vgg16"]
    published = make_published("vgg16")
    path = put(published.state_dict(), tmp_path, "vgg16")
    for include_top in (True, False):
        built = network.build(2, 0)
        network.load_published_weights(built, of, path, include_top)
        for layer in ("0", "3"):
            same = torch.equal(built.classifier[int(layer)].weight, published.classifier[int(layer)].weight)
            assert same == include_top
        assert built.classifier[6].weight.shape == (2, 4096)
        assert torch.equal(built.features[28].weight, published.features[28].weight)


# --- what workers report ---------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Records when torchvision's site is tried, which does not answer."""
    tried: list[str] = []
    monkeypatch.setattr(weights, "is_reachable", lambda url: bool(tried.append(url)))
    weights._can_download.cache_clear()
    return tried


def test_whole_files_are_readable_and_damaged_ones_are_not(tmp_path, asked):
    folder = tmp_path / "weights"
    assert weights.readable(folder) == []
    path = put({"a": torch.zeros(1)}, folder)
    (folder / "vgg16-397923af.pth").write_bytes(b"cut off")
    (folder / ".hidden").touch()
    (folder / "own.safetensors").touch()
    (folder / "sub").mkdir()
    files = ["file:own.safetensors", f"file:{path.name}", "file:vgg16-397923af.pth"]
    assert weights.readable(folder) == ["imagenet:resnet18", *files]
    path.write_bytes(path.read_bytes() + b"x")
    assert weights.readable(folder) == files
    assert len(asked) == 1, "a request every few seconds would be a nuisance"


def test_where_the_site_answers_all_networks_can_be_had(tmp_path, monkeypatch):
    weights._can_download.cache_clear()
    monkeypatch.setattr(weights, "is_reachable", lambda url: True)
    assert weights.readable(tmp_path) == sorted(f"imagenet:{name}" for name in ARCHITECTURES)
    weights._can_download.cache_clear()


def test_torchs_cache_is_where_torch_has_it(monkeypatch, tmp_path):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert weights.cache_folder() == Path(torch.hub.get_dir()) / "checkpoints"
        monkeypatch.delenv(name)
    assert weights.cache_folder() == Path(torch.hub.get_dir()) / "checkpoints"
