"""Grad-CAM: the heat is where the network looks, in the scan's own coordinates, for each of the six networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ml.image.engines.backends import engine_name
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES, Patches
from ml.image.networks.network import Model
from ml.image.pixels.decoding import decode, read
from ml.image.pixels.transforms import Transform
from ml.image.serving.gradcam import Explainer, Explanation, _log_odds, _Maps, _Tokens
from ml.image.serving.predictor import CachedScan, Predictor, ScanInput
from ml.runtime.errors import BadParams, EngineNotAdmitted, ImageError, ModelFileError
from ml.spec.image import FIXED_SIDE, LEAST_SIDE, NETWORKS
from tests.depth import rest_in_full
from tests.ml.builders import (
    CLASSES,
    LIGHT_NETWORKS,
    encode,
    last_linear,
    make_dicom,
    make_pixels,
    make_scans,
)

CONVOLUTIONAL = sorted({*NETWORKS} - {"vit_b_16"})
HEIGHT, WIDTH, SPOT = 150, 260, 50


def make_model(name: str = "resnet18", side: int | None = None, **metadata: object) -> Model:
    """An untrained model whose batch normalizations are calibrated."""
    side = side or FIXED_SIDE.get(name, LEAST_SIDE.get(name, 64))
    of, built = ARCHITECTURES[name], network.build(len(CLASSES), 0, name, "gap").eval()
    transform = Transform(side, side, of.mean, of.std)
    with torch.no_grad():
        network.calibrate_batch_norms(built, [transform.normalize(torch.from_numpy(make_scans(6, side)))])
    return Model(built, CLASSES, transform, metadata, name, "gap")


@torch.no_grad()
def make_spotter(name: str) -> Model:
    """A network that passes brightness on, and classifies bright scans as tumours."""
    model = make_model(name, side=224)
    built = network.build(len(CLASSES), 0, name, "gap").eval()
    for path, layer in built.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
            if name == "vgg16" or path == "conv1" or "downsample" in path:  # the rest of a residual block adds nothing
                middle = layer.kernel_size[0] // 2
                layer.weight[0, 0, middle, middle] = 1
    spotter = Model(built, CLASSES, model.transform, {}, name, "gap")
    last_linear(spotter).weight.zero_()[:, 0] = torch.tensor([-1.0, 1.0])
    last_linear(spotter).bias.zero_()
    return spotter


def with_spot(top: int, left: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[top : top + SPOT, left : left + SPOT] = 240
    return encode(pixels)


@cache
def explainer() -> Explainer:
    """An explainer of a ResNet18 for small pictures. Do not change it."""
    return Explainer(make_model())


@cache
def spotter(name: str = "resnet18") -> Explainer:
    """An explainer of `make_spotter`. Do not change it."""
    return Explainer(make_spotter(name))


def explained(scan: bytes, label: str | None = None, by: Explainer | None = None) -> Explanation:
    (one,) = (by or explainer()).explain([ScanInput("a", scan)], label)
    return one


def picture_of(one: Explanation) -> np.ndarray:
    assert one.overlay is not None
    return np.asarray(Image.open(io.BytesIO(one.overlay), formats=["PNG"]))


def grey_of(scan: bytes) -> np.ndarray:
    grey = np.asarray(Image.fromarray(decode(scan)).convert("L"))
    return np.repeat(grey[:, :, None], 3, axis=2)


# --- where the heat lies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_the_peak_is_in_the_corner_that_the_answer_depends_on(name):
    for top in (0, HEIGHT - SPOT):
        for left in (0, WIDTH - SPOT):
            one = explained(with_spot(top, left), "Tumor", spotter(name))
            row, column = np.unravel_index(one.heatmap.argmax(), one.heatmap.shape)
            assert top <= row < top + SPOT, (top, left)
            assert left <= column < left + SPOT, (top, left)
            far = one.heatmap[SPOT:-SPOT, 2 * SPOT : -2 * SPOT]
            assert far.max() < 0.1 < 0.9 < one.heatmap.max() <= 1


def test_what_speaks_for_one_class_says_nothing_for_the_other():
    scan = with_spot(10, 200)
    assert explained(scan, "Tumor", spotter()).heatmap.max() > 0.9
    assert explained(scan, "Normal", spotter()).heatmap.max() == 0


@torch.no_grad()
def evenly(name: str) -> nn.Module:
    """A network with averaging convolutions only, so that a cell's gradient is even over its receptive field."""
    built = network.build(2, 0, name, "gap").eval()
    for path, layer in built.named_modules():
        if isinstance(layer, nn.Conv2d):
            whole_picture = path.endswith("fc2")  # of EfficientNet's gates
            layer.weight.fill_(0 if whole_picture else 1 / layer.weight[0].numel())
    return built


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_cells_are_where_their_receptive_fields_have_their_centre(name, monkeypatch):
    def mean_pool(maps: torch.Tensor, kernel_size: int, stride: int, padding: int = 0, *_, **__) -> torch.Tensor:
        return F.avg_pool2d(maps, kernel_size, stride, padding)

    monkeypatch.setattr(F, "max_pool2d", mean_pool)
    built, seen = evenly(name), list[torch.Tensor]()
    built.get_submodule(ARCHITECTURES[name].cam).register_forward_hook(lambda layer, inputs, maps: seen.append(maps))
    images = torch.ones(1, 3, 1024, 96, requires_grad=True)
    built(images)
    step, first = ARCHITECTURES[name].cells
    for row in (int(400 / step), int(600 / step)):
        (looked,) = torch.autograd.grad(seen[0][0, :, row].sum(), images, retain_graph=True)
        rows = looked[0].sum((0, 2)).double()
        assert float((rows * torch.arange(1024)).sum() / rows.sum()) == pytest.approx(first + row * step, abs=0.5)


def test_what_two_cells_see_alike_lies_between_them():
    by, cells = explainer(), np.zeros((2, 2), np.float32)  # of 64 pixels: at 0 and 32
    cells[1] = 1
    assert by._upscale(cells, 64, 64)[:, 5].argmax() == pytest.approx(32, abs=1)
    cells[0] = 1
    heat = by._upscale(cells, 64, 64)
    assert heat.min() > 0.95, "where all cells see the same, it is everywhere"
    by = Explainer(make_model(side=224))
    cells = np.zeros((7, 7), np.float32)
    cells[3, 2:4] = 1, 0.9
    row, column = np.unravel_index(by._upscale(cells, 224, 224).argmax(), (224, 224))
    assert (row, column) == (3 * 32, pytest.approx(2.5 * 32 - 2, abs=2)), "a little nearer to the stronger one"


def test_a_scan_of_few_pixels_may_miss_the_strongest_cell():
    by, cells = Explainer(make_model(side=224)), np.zeros((7, 7), np.float32)
    cells[0, 0] = 1
    assert by._upscale(cells, 1, 1).tolist() == [[0]]
    assert by._upscale(cells, 100, 100).max() == 1


def test_the_heat_lies_where_the_network_looks_in_millimetres():
    """A network of 64 pixels of 1 mm sees the middle half of 128 mm, and all of 32 mm."""
    model = make_model()
    by, cells = (
        Explainer(replace(model, transform=replace(model.transform, spacing_mm=1.0))),
        np.zeros((2, 2), np.float32),
    )
    cells[1, 1] = 1
    plain, large = by._upscale(cells, 64, 64), by._upscale(cells, 128, 128, (1.0, 1.0))
    assert large[32:96, 32:96] == pytest.approx(plain)
    assert large.sum() == pytest.approx(plain.sum())
    small = by._upscale(cells, 32, 32, (1.0, 1.0))
    assert small == pytest.approx(plain[16:48, 16:48] / plain[16:48, 16:48].max(), abs=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_a_transformers_tokens_are_the_patches_row_by_row():
    model = make_model("vit_b_16")
    pictures = np.zeros((2, 224, 224, 3), np.uint8)
    pictures[1, 3 * 16 : 4 * 16, 12 * 16 : 13 * 16] = 255
    tokens = Patches(model.network)(model.transform.normalize(torch.from_numpy(pictures)))
    maps, class_token = _Maps()(tokens)
    assert torch.equal(_Tokens()((maps, class_token)), tokens)
    changed = (maps[1] - maps[0]).abs().sum(0)
    assert np.argwhere(changed.numpy() > 1e-3).tolist() == [[3, 12]]
    step, first = ARCHITECTURES["vit_b_16"].cells
    assert (first + 3 * step, first + 12 * step) == (3 * 16 + 7.5, 12 * 16 + 7.5)


# --- every network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rest_in_full(NETWORKS, LIGHT_NETWORKS.__contains__))
def test_each_network_gives_a_heatmap_for_each_class_and_the_same_one_again(name):
    by, scan = Explainer(make_model(name)), encode(make_pixels(1, 40, 70, bright=True))
    first, second = (explained(scan, label, by) for label in CLASSES)
    for one in (first, second):
        assert (one.heatmap.shape, one.heatmap.dtype) == ((40, 70), np.float32)
        assert 0 <= one.heatmap.min() <= one.heatmap.max() <= 1
    assert max(first.heatmap.max(), second.heatmap.max()) > 0.5
    assert not np.allclose(first.heatmap, second.heatmap, atol=0.01)
    assert np.array_equal(explained(scan, CLASSES[0], by).heatmap, first.heatmap)
    assert explained(scan, CLASSES[0], by).overlay == first.overlay


@pytest.mark.parametrize("name", rest_in_full(NETWORKS, LIGHT_NETWORKS.__contains__))
def test_it_is_grad_cam_as_the_paper_has_it_on_the_whole_network(name):
    """Compared with a plain forward and backward pass of the whole network in torch."""
    model, scan = make_model(name), encode(make_pixels(1, 224, 224, bright=True))
    seen, whole = list[torch.Tensor](), copy.deepcopy(model.network).requires_grad_(True)
    whole.get_submodule(ARCHITECTURES[name].cam).register_forward_hook(lambda layer, inputs, maps: seen.append(maps))
    resized = torch.tensor(model.transform.resize(decode(scan)))[None]
    logits, by, highest = whole.eval()(model.transform.normalize(resized))[0], Explainer(model, "fp32"), 0.0
    ours = by._features(read(scan))
    for label in range(len(CLASSES)):
        log_odds = logits[label] - logits[1 - label]
        maps, (gradient,) = seen[0].detach(), torch.autograd.grad(log_odds, seen[0], retain_graph=True)
        if name == "vit_b_16":
            maps, gradient = (of[:, 1:].transpose(1, 2).unflatten(2, (14, 14)) for of in (maps, gradient))
        cells = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).clamp(min=0)[0].numpy()
        highest = max(highest, float(cells.max()))
        assert by._cam(ours, label) == pytest.approx(cells, abs=0.01 * highest)
    assert highest > 0


def test_what_raises_all_logits_alike_changes_no_heatmap():
    scan, by, raised = encode(make_pixels(1, 60, 60, bright=True)), Explainer(make_model()), make_model()
    with torch.no_grad():
        last_linear(raised).weight += torch.randn(last_linear(raised).in_features, generator=torch.manual_seed(1))
    for label in CLASSES:
        ours, theirs = explained(scan, label, by).heatmap, explained(scan, label, Explainer(raised)).heatmap
        assert theirs == pytest.approx(ours, abs=1e-3)


def test_of_many_classes_one_speaks_against_all_others_by_their_share():
    logits = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(_log_odds(logits, 0).sum(), logits)
    share = torch.softmax(logits.detach()[0, 1:], 0)
    assert gradient[0].tolist() == pytest.approx([1, -share[0].item(), -share[1].item()])
    assert torch.sigmoid(_log_odds(logits, 0)).item() == pytest.approx(torch.softmax(logits, 1)[0, 0].item())


def test_the_engines_rounding_hardly_moves_the_heat():
    scans = [encode(make_pixels(seed, 100, 100, bright=seed % 2 == 1)) for seed in range(4)]
    fast = [explained(scan, "Tumor") for scan in scans]
    exact = Explainer(make_model(), "fp32")
    for scan, one in zip(scans, fast, strict=True):
        assert np.abs(one.heatmap - explained(scan, "Tumor", exact).heatmap).max() < 0.05


def engine_of(by: Explainer) -> str:
    return by._below.name


def test_it_computes_in_the_form_that_was_asked_for():
    assert engine_of(Explainer(make_model(), "fp32")) == engine_name("fp32")


def test_all_cores_work_at_the_one_scan():
    assert explainer()._below.streams == 1


@pytest.mark.skipif("bf16" not in supported_dtypes(), reason="this machine multiplies no bf16")
def test_a_form_that_was_refused_for_predictions_is_none_for_explanations():
    trials = {engine_name("bf16"): {"admitted": False, "reason": "2 labels changed"}}
    assert engine_of(Explainer(make_model(engines=trials))) == engine_name("fp32")
    with pytest.raises(EngineNotAdmitted, match="2 labels changed"):
        Explainer(make_model(engines=trials), "bf16")
    assert engine_of(Explainer(make_model(engines={engine_name("bf16"): {"admitted": True}}))) == engine_name("bf16")


# --- every class -----------------------------------------------------------------------------------------------------


def test_the_other_classes_are_explained_by_the_same_forward(monkeypatch):
    forwards, scan = list[int](), with_spot(10, 200)
    by = spotter()
    forward = by._features
    monkeypatch.setattr(by, "_features", lambda pixels: forwards.append(1) or forward(pixels))
    one, other = by.each_class(ScanInput("a", scan), "Tumor")
    assert (one.label, other.label, len(forwards)) == ("Tumor", "Normal", 1)
    for each in (one, other):
        alone = explained(scan, each.label, by)
        assert np.array_equal(each.heatmap, alone.heatmap)
        assert each.overlay == alone.overlay
    assert (one.is_blank, other.is_blank) == (False, True)


def test_each_class_is_made_when_it_is_asked_for(monkeypatch):
    by, made = spotter(), list[int]()
    weighed = by._cam
    monkeypatch.setattr(by, "_cam", lambda features, label: made.append(label) or weighed(features, label))
    stream = by.each_class(ScanInput("a", with_spot(10, 200)), "Tumor")
    next(stream)
    assert made == [1]
    assert [one.label for one in stream] == ["Normal"]
    assert made == [1, 0]


def test_of_a_broken_scan_there_is_one_error_and_of_an_unknown_class_nothing():
    (one,) = explainer().each_class(ScanInput("a", b"junk"))
    assert (one.id, one.error_code, one.overlay) == ("a", "BAD_IMAGE", None)
    with pytest.raises(BadParams, match="Normal, Tumor"):
        explainer().each_class(ScanInput("a", b"junk"), "Cyst")


def test_a_scan_that_was_predicted_is_not_decoded_again():
    model, read = make_model(), list[int]()
    scan = CachedScan("a", lambda: read.append(1) or encode(make_pixels(1, 40, 70)))
    (found,) = Predictor.from_model(model).predict([scan])
    (one,) = Explainer(model).explain([scan], found.label)
    assert read == [1]
    assert np.array_equal(one.heatmap, explained(encode(make_pixels(1, 40, 70)), found.label, Explainer(model)).heatmap)


def test_a_heatmap_is_a_grey_picture_of_256_levels():
    one = explained(with_spot(10, 200), "Tumor", spotter())
    with Image.open(io.BytesIO(one.heatmap_png()), formats=["PNG"]) as picture:
        assert (picture.mode, picture.size) == ("L", (WIDTH, HEIGHT))
        levels = np.asarray(picture)
    assert np.abs(levels / 255 - one.heatmap).max() <= 0.5 / 255 + 1e-6
    assert levels.max() == 255


# --- the scan's own size ---------------------------------------------------------------------------------------------

SCANS = {
    "wide": encode(make_pixels(0, 60, 100)),
    "high": encode(make_pixels(0, 100, 30), "JPEG"),
    "tiny": encode(make_pixels(0, 3, 2)),
    "one pixel": encode(np.full((1, 1, 3), 90, np.uint8)),
    "DICOM": make_dicom(np.arange(50 * 80, dtype=np.int16).reshape(50, 80) // 10 - 150),
}


@pytest.mark.parametrize("scan", SCANS)
def test_heatmap_and_overlay_have_the_size_of_the_scan(scan):
    one = explained(SCANS[scan])
    assert one.heatmap.shape == decode(SCANS[scan]).shape[:2]
    assert picture_of(one).shape == (*one.heatmap.shape, 3)


def test_the_overlay_is_the_grey_scan_where_nothing_is_seen_and_coloured_where_it_is():
    scan = with_spot(50, 100)
    one = explained(scan, "Tumor", spotter())
    overlay, grey = picture_of(one).astype(int), grey_of(scan)
    cold, hot = one.heatmap == 0, one.heatmap > 0.9
    assert np.array_equal(overlay[cold], grey[cold])
    assert cold.any()
    assert (np.ptp(overlay[hot], axis=1) > 50).all()
    assert hot.any()


def spoiled(value: float) -> Explainer:
    model = make_model()
    with torch.no_grad():
        last_linear(model).weight.fill_(value)
    return Explainer(model)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_the_heat_is_nowhere(value):
    scan = encode(make_pixels())
    one = explained(scan, by=spoiled(value))
    assert np.isfinite(one.heatmap).all()
    assert 0 <= one.heatmap.min() <= one.heatmap.max() <= 1
    assert one.is_blank == (one.heatmap.max() == 0)
    if not value:
        assert one.is_blank
        assert np.array_equal(picture_of(one), grey_of(scan))


# --- which class, which scans ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explained") / "model.safetensors"
    network.save(make_model(), path)
    return path


def test_without_a_label_it_is_the_class_that_predictions_name(model_path):
    scans = [ScanInput(str(seed), encode(make_pixels(seed, bright=seed % 2 == 1))) for seed in range(6)]
    predicted = list(Predictor.from_model(network.load(model_path), "fp32").predict(scans))
    found = list(Explainer.load(model_path).explain(scans))
    assert [(one.id, one.label) for one in found] == [(one.id, one.label) for one in predicted]


@pytest.mark.parametrize(("threshold", "label"), [(0.0, "Tumor"), (1.0, "Normal")])
def test_the_models_threshold_decides_the_class(threshold, label):
    by = Explainer(make_model(calibration={"temperature": 1.0, "threshold": threshold}))
    assert explained(encode(make_pixels()), by=by).label == label


def test_a_label_that_the_network_does_not_know_is_refused_at_once():
    with pytest.raises(BadParams, match=r"label.*Normal, Tumor"):
        explainer().explain([], "Cyst")


def test_broken_scans_are_errors_of_their_own_and_in_their_place(tmp_path):
    def gone() -> bytes:
        raise ImageError("The scan is no longer there.")

    good = encode(make_pixels())
    sources = [good, b"junk", tmp_path / "missing.png", gone, lambda: good]
    found = list(explainer().explain(ScanInput(str(number), source) for number, source in enumerate(sources)))
    assert [one.id for one in found] == ["0", "1", "2", "3", "4"]
    assert [one.error_code for one in found] == [None, *["BAD_IMAGE"] * 3, None]
    assert found[3].error_detail == "The scan is no longer there."
    for one in found[1:4]:
        assert (one.label, one.heatmap, one.overlay) == (None, None, None)


def test_scans_are_taken_one_at_a_time():
    taken: list[str] = []

    def endless() -> Iterator[ScanInput]:
        for number in count():
            taken.append(str(number))
            yield ScanInput(str(number), encode(make_pixels(number)))

    stream = explainer().explain(endless())
    assert [next(stream).id, next(stream).id] == taken == ["0", "1"]


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelFileError):
        Explainer.load(tmp_path / "model.safetensors")
