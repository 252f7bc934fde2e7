"""The drift reference: bins that test scans fill evenly, and in which deviations are visible."""

from __future__ import annotations

import json
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.image.pixels.statistics import MEANINGS
from ml.image.serving.drift_reference import drift_reference
from ml.image.stages import runner
from ml.runtime.config import load_config, parse_params
from ml.runtime.events import Evaluated, Event
from tests.ml.builders import make_files, write_zip
from tests.ml.conftest import SIDE, SMALL, write_config


def make_statistics(count: int, seed: int = 0) -> list[dict[str, float]]:
    random = np.random.default_rng(seed)
    return [{name: float(random.normal(50, 10)) for name in MEANINGS} for _ in range(count)]


def make_reference(count: int = 100, **fixed: list[float]) -> dict:
    statistics = make_statistics(count)
    for name, values in fixed.items():
        statistics = [{**one, name: value} for one, value in zip(statistics, values, strict=True)]
    labels = ["Tumor" if number % 4 == 0 else "Normal" for number in range(count)]
    confidences = np.linspace(0.5, 1, count).tolist()
    return drift_reference(statistics, confidences, labels, ("Cyst", "Normal", "Tumor"), 3, np.arange(count))


def test_the_reference_counts_predicted_classes_and_rejected_scans():
    found = make_reference(100)
    assert found["scans"] == 100
    assert found["classes"] == {"Cyst": 0, "Normal": 75, "Tumor": 25}
    assert found["rejected"] == 3
    assert set(found["statistics"]) == {*MEANINGS, "confidence"}


def test_without_an_ood_detector_the_reference_has_no_rejected():
    found = drift_reference(make_statistics(40), [0.9] * 40, ["Normal"] * 40, ("Normal", "Tumor"), None, np.arange(40))
    assert "rejected" not in found


def test_a_training_on_too_few_scans_has_no_ood_detector(tmp_path):
    """Otherwise drift would be measured against a rejection rate of 0."""
    archive = write_zip(make_files(8, side=SIDE), tmp_path / "data.zip")
    events = list[Event]()
    runner.run_all(load_config(write_config(tmp_path, archive)), parse_params(SMALL | {"epochs": 1}), events.append)
    (evaluated,) = (event for event in events if isinstance(event, Evaluated))
    assert "rejected" not in evaluated.reference
    assert evaluated.reference["scans"] > 0


@pytest.mark.parametrize(("scans", "bins"), [(1, 1), (8, 2), (29, 2), (50, 5), (100, 10), (5000, 10)])
def test_few_scans_have_few_bins_and_each_holds_about_as_many(scans, bins):
    found = make_reference(scans)["statistics"]
    for histogram in found.values():
        assert len(histogram["counts"]) == len(histogram["edges"]) + 1 == max(bins, 2)
        assert sum(histogram["counts"]) == scans
        if scans > 1:
            assert max(histogram["counts"]) <= min(histogram["counts"]) + 1


def test_a_scan_is_counted_where_it_will_be_looked_up():
    statistics = make_statistics(60)
    made = drift_reference(statistics, [0.9] * 60, ["Normal"] * 60, ("Normal", "Tumor"), 0, np.arange(60))
    histogram = made["statistics"]["contrast"]
    counts = [0] * len(histogram["counts"])
    for one in statistics:
        counts[bisect_right(histogram["edges"], one["contrast"])] += 1
    assert counts == histogram["counts"]


def test_equal_values_leave_a_bin_for_what_is_new():
    grey = make_reference(40, colour=[0.0] * 40)["statistics"]["colour"]
    assert grey == {"edges": [MEANINGS["colour"].tolerance], "counts": [40, 0]}
    assert bisect_right(grey["edges"], 0.2) == 0, "what another encoder changes is nothing new"
    assert bisect_right(grey["edges"], 30) == 1


def test_many_scans_at_the_lowest_value_share_one_bin():
    some_white = [0.0] * 70 + np.linspace(0.1, 0.5, 30).tolist()
    histogram = make_reference(100, white=some_white)["statistics"]["white"]
    assert histogram["counts"][0] == 70
    assert sum(histogram["counts"][1:]) == 30


@given(st.lists(st.floats(0, 255, width=32), min_size=1, max_size=60))
def test_edges_rise_strictly_whatever_the_values(values):
    histogram = make_reference(len(values), brightness=values)["statistics"]["brightness"]
    assert (np.diff(histogram["edges"]) > 0).all()
    assert sum(histogram["counts"]) == len(values)


@pytest.mark.parametrize(
    ("sizes", "studies", "bins"),
    [([1] * 60, 60, 6), ([3] * 20, 20, 2), ([30, 30], 2, 2), ([28, 1, 1], 900 / 786, 2), ([4] * 100, 100, 10)],
)
def test_scans_of_one_patient_count_once(sizes, studies, bins):
    """Kish's effective size: of equal groups their number, of one large group little more than 1."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    count = len(groups)
    made = drift_reference(make_statistics(count), [0.9] * count, ["N"] * count, ("N", "T"), 0, groups)
    assert (made["scans"], made["studies"]) == (count, pytest.approx(studies))
    assert len(made["statistics"]["brightness"]["counts"]) == bins


def test_the_last_event_of_a_run_carries_it_as_json(small_run):
    (evaluated,) = (event for event in small_run.events if isinstance(event, Evaluated))
    reference = evaluated.reference
    assert json.loads(json.dumps(reference, allow_nan=False)) == reference
    assert reference["scans"] == evaluated.metrics["held_out"]
    assert 1 <= reference["studies"] <= evaluated.metrics["independent"]
    called = np.sum(evaluated.metrics["confusion_matrix"], axis=0)
    assert list(reference["classes"].values()) == called.tolist()
    assert 0 <= reference["rejected"] <= reference["scans"]
