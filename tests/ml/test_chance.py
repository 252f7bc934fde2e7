"""Labels without any signal score like chance: 60 patients of 6 slices that look alike within a patient.

A split that divides patients recognizes them, and scores 0.9 and more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ml.image.stages import runner
from ml.runtime.config import load_config, parse_params
from ml.runtime.events import Evaluated, Event
from tests.ml.builders import write_zip
from tests.ml.conftest import SIDE, SMALL, write_config
from tests.ml.patient_sets import anonymous_studies, folders_alone, names_of_slices, unknown

PATIENTS, SLICES = 60, 6
LABELS = ("Normal", "Tumor")


def slice_of(patient: int, index: int) -> np.ndarray:
    """A patient's own coarse pattern with some noise, int16 [SIDE, SIDE]."""
    pattern = np.random.default_rng(patient).integers(-190, 190, (8, 8))
    noise = np.random.default_rng(1000 * patient + index).integers(-60, 60, (SIDE, SIDE))
    return (np.kron(pattern, np.ones((SIDE // 8, SIDE // 8))) + noise).astype(np.int16)


def label_of(patient: int) -> str:
    """By lot, as often each."""
    return LABELS[np.random.default_rng(5).permutation(PATIENTS)[patient] % 2]


def scores(tmp_path, kind: Callable[[int, int, np.ndarray], tuple[str, bytes]]) -> Evaluated:
    files = {}
    for patient in range(PATIENTS):
        for index in range(SLICES):
            name, content = kind(patient, index, slice_of(patient, index))
            files[f"{label_of(patient)}/{name}"] = content
    assert len(files) == PATIENTS * SLICES
    events: list[Event] = []
    params = parse_params({**SMALL, "network": "resnet18", "augmentation": False, "epochs": 8, "test_size": 0.4})
    runner.run_all(load_config(write_config(tmp_path, write_zip(files, tmp_path / "data.zip"))), params, events.append)
    return next(event for event in events if isinstance(event, Evaluated))


@pytest.mark.full
@pytest.mark.parametrize("kind", [names_of_slices, anonymous_studies, folders_alone])
def test_labels_without_signal_score_like_chance(tmp_path, kind):
    metrics = scores(tmp_path, kind).metrics
    assert set(metrics["leaks"].values()) == {0}
    assert abs(metrics["accuracy"] - 0.5) <= 0.2
    low, high = metrics["intervals"]["accuracy"]
    assert low <= 0.5 <= high


@pytest.mark.full
def test_the_same_scans_score_far_above_chance_where_nothing_tells_the_patients(tmp_path):
    """So the test above can fail; and the scores say that patients are not known."""
    metrics = scores(tmp_path, unknown).metrics
    assert metrics["accuracy"] > 0.8
    assert not metrics["patients_known"]
