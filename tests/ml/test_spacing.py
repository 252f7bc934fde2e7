"""One size in millimetres from the dataset to the prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.decoding import PIXELS_VERSION, read
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor, ScanInput
from ml.image.stages.ingestion import data_ingestion
from ml.image.stages.run import Run
from ml.runtime.config import load_config, parse_params
from tests.ml.builders import CLASSES, write_folder
from tests.ml.conftest import write_config
from tests.ml.raw_dicom import raw_dicom

SIDE = 64


def slice_of(field_mm: float, seed: int) -> bytes:
    """A CT slice of 96 × 96 pixels with a bright square of 40 mm in its middle."""
    spacing = field_mm / 96
    y, x = (np.mgrid[:96, :96] + 0.5 - 48) * spacing
    values = np.where((abs(y) < 20) & (abs(x) < 20), 200, -100 + seed).astype(np.int16)
    return raw_dicom(values, PixelSpacing=f"{spacing:.6f}\\{spacing:.6f}", SOPInstanceUID=f"1.2.{seed + 1}")


def bright_side(pixels: np.ndarray) -> int:
    """The length of the bright square's side in pixels, from half its height over the ground."""
    return int((pixels[..., 0] > 147).any(0).sum())


def test_scans_of_different_views_are_stored_in_one_size(tmp_path: Path) -> None:
    fields = (128.0, 160.0, 192.0)
    files = {
        f"{name}/{name}-{index}.dcm": slice_of(fields[index % 3], 10 * side + index)
        for side, name in enumerate(CLASSES)
        for index in range(6)
    }
    folder = write_folder(files, tmp_path / "scans")
    for wanted, expected in ((1.0, [40]), (None, [13, 16, 20])):
        at = tmp_path / str(wanted)
        params = parse_params({"image_size": [SIDE, SIDE, 3], "spacing_mm": wanted})
        data_ingestion(Run(load_config(write_config(at, folder)), params, lambda event: None))
        pixels = np.load(at / "data" / "pixels.npy")
        found = sorted({bright_side(each) for each in pixels})
        assert np.abs(np.array(found) - expected).max() <= 1, "in pixels of 1 mm, else in shares of the view"


def test_a_model_predicts_in_the_size_and_by_the_rules_that_it_learnt_with(tmp_path: Path) -> None:
    built = network.build(2, 0, "resnet18", "gap").eval()
    made = Model(built, CLASSES, Transform(SIDE, SIDE, spacing_mm=1.0, rules=1), {}, "resnet18", "gap")
    network.save(made, tmp_path / "model.safetensors")
    loaded = network.load(tmp_path / "model.safetensors")
    assert (loaded.transform.spacing_mm, loaded.transform.rules) == (1.0, 1)
    content = slice_of(192, 0)
    picture = read(content, rules=1)
    (found,) = Predictor.from_model(loaded, "fp32").predict([ScanInput("a", content)])
    seen = loaded.transform.resize(picture.pixels, picture.spacing_mm)
    (logits,) = Predictor.from_model(loaded, "fp32").logits([seen[None]])
    chances = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert np.abs(chances - list(found.probabilities.values())).max() < 1e-4
    assert abs(bright_side(seen) - 40) <= 1
    assert network.read_metadata(tmp_path / "model.safetensors")["transform"]["rules"] == 1
    assert Transform().as_dict()["rules"] == PIXELS_VERSION
