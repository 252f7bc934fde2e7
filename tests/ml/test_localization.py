"""Grad-CAM finds the tumour: a network trained on phantoms, tested on phantoms of other patients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ml.__main__ import main
from ml.image.serving.gradcam import Explainer
from ml.image.serving.predictor import ScanInput
from ml.synthetic import phantom_files
from ml.synthetic.phantom import Slice, generate

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

SIDE, NEAR = 224, 16
"""Pixels: a scan's side; and the distance allowed between peak and tumour, half a cell of the maps."""
PARAMS = {
    "weights": "none", "network": "resnet18", "image_size": [SIDE, SIDE, 3], "augmentation": False, "dropout": 0.0,
    # The head is hardly touched before the blocks below it learn: a head that knows random maps well holds them back.
    "standardize": False, "epochs": 1, "learning_rate": 1e-6,
    "fine_tune_blocks": 2, "fine_tune_epochs": 5, "fine_tune_learning_rate": 2e-4, "optimizer": "adamw",
    "batch_size": 8, "schedule": "cosine", "warmup_epochs": 1, "test_size": 0.1, "validation_size": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training."""
    folder = tmp_path_factory.mktemp("localization")
    phantom_files.write_dataset(folder / "scans", patients=1000, slices=1, seed=0, size=SIDE)
    settings = [part for name, value in PARAMS.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    assert main(["train", "--data", str(folder / "scans"), "--out", str(folder / "run"), *settings]) == 0
    return folder / "run"


def found_tumours(trained: Path) -> Iterator[tuple[Slice, np.ndarray]]:
    """Correctly classified tumour slices of other patients, with their heatmaps."""
    by = Explainer.load(trained / "training" / "model.safetensors")
    for image in generate(patients=100, slices=1, seed=1000, size=SIDE):
        (one,) = by.explain([ScanInput(image.name, phantom_files.png_bytes(image))])
        if image.label == one.label == "Tumor":
            yield image, one.heatmap


def test_the_peak_lies_in_or_beside_the_tumour(trained: Path) -> None:
    scores = json.loads((trained / "evaluation" / "scores.json").read_text())
    assert scores["f1"] >= 0.95
    away = []
    for image, heatmap in found_tumours(trained):
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        rows, columns = np.nonzero(image.tumour_mask)
        away.append(np.hypot(rows - row, columns - column).min())
    near = np.mean(np.array(away) <= NEAR)
    print(f"F1 {scores['f1']:.3f}; {len(away)} tumours found, the peak of {near:.0%} in or within {NEAR} px of them")
    assert len(away) >= 40
    assert near >= 0.7
