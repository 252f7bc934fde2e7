"""Subgroups: their figures, where there are enough patients, and a warning where one differs."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from ml.evaluation import subgroups as module
from ml.evaluation.intervals import Decisions
from ml.evaluation.subgroups import subgroups
from ml.image.stages import runner
from ml.runtime.config import load_config, parse_params
from ml.runtime.events import Evaluated, Event
from ml.spec.operating_point import MIN_GROUPS, share
from tests.ml.builders import make_files, write_zip
from tests.ml.conftest import SIDE, SMALL, write_config


def decided(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, positive: int | None = 1) -> Decisions:
    """Decisions whose margins agree with what is predicted."""
    classes = max(2, int(labels.max()) + 1)
    margins = np.where(np.arange(classes) == predicted[:, None], 2.0, -2.0)
    return Decisions(labels, predicted, margins, groups, positive)


def simulated(
    random: np.random.Generator, patients: int, each: int, missed: np.ndarray, likeness: float = 0.7
) -> Decisions:
    """Patients of alternating classes; `missed`: the probability that a scan of the patient is wrong."""
    groups = np.repeat(np.arange(patients), each)
    labels = groups % 2
    of_patient, of_scan = random.normal(size=patients)[groups], random.normal(size=len(groups))
    score = np.sqrt(likeness) * of_patient + np.sqrt(1 - likeness) * of_scan
    wrong = score < np.array([NormalDist().inv_cdf(rate) for rate in missed])[groups]
    return decided(labels, np.where(wrong, 1 - labels, labels), groups)


def drawn(random: np.random.Generator, patients: int, each: int) -> list[dict[str, str]]:
    """Three scanners, two sexes and four ages by lot."""
    numbers = {"scanner": 3, "sex": 2, "age": 4}
    values = {name: random.integers(0, count, patients) for name, count in numbers.items()}
    return [{name: str(of[patient]) for name, of in values.items()} for patient in np.repeat(np.arange(patients), each)]


@pytest.mark.parametrize(("patients", "each"), [(60, 1), (100, 4), (200, 1), (200, 10)])
def test_equal_subgroups_are_warned_of_in_at_most_one_test_set_in_ten(patients: int, each: int) -> None:
    """Nine values with two figures each; slices of a patient are alike. Simply tested, two sets in three would warn."""
    random, warned = np.random.default_rng(patients + each), 0
    for _ in range(100):
        decisions = simulated(random, patients, each, np.full(patients, 0.15))
        warned += any(one.warning for one in subgroups(decisions, drawn(random, patients, each)))
    assert warned <= 10


@pytest.mark.parametrize(("patients", "each"), [(200, 1), (100, 4)])
def test_a_scanner_on_which_many_are_missed_is_found(patients: int, each: int) -> None:
    random, found = np.random.default_rng(each), 0
    for _ in range(30):
        traits = drawn(random, patients, each)
        bad = np.array([traits[each * patient]["scanner"] == "0" for patient in range(patients)])
        decisions = simulated(random, patients, each, np.where(bad, 0.5, 0.1))
        warned = [one for one in subgroups(decisions, traits) if one.warning]
        found += any((one.trait, one.value) == ("scanner", "0") and "lower" in (one.warning or "") for one in warned)
    assert found >= 24


def test_figures_are_those_of_the_subgroups_own_scans() -> None:
    """Scanner A: of 12 positives 3 are missed, of 10 negatives none; each scan is of a patient of its own."""
    labels = np.array([1] * 12 + [0] * 10 + [1] * 15 + [0] * 15)
    predicted = labels.copy()
    predicted[:3] = 0
    decisions = decided(labels, predicted, np.arange(len(labels)))
    traits = [{"scanner": "A"}] * 22 + [{"scanner": "B"}] * 30
    first, second = subgroups(decisions, traits)
    assert (first.trait, first.value, first.scans, first.groups) == ("scanner", "A", 22, 22)
    assert first.figures["recall"] is not None
    assert first.figures["recall"][0] == 9 / 12
    assert first.figures["specificity"] is not None
    assert first.figures["specificity"][0] == 1
    assert second.figures["accuracy"] is not None
    assert second.figures["accuracy"][0] == 1
    for value, low, high in filter(None, (*first.figures.values(), *second.figures.values())):
        assert 0 <= low <= value <= high <= 1


@pytest.mark.parametrize(
    ("positives", "negatives", "slices", "told"),
    [
        (MIN_GROUPS, MIN_GROUPS, 1, {"accuracy", "recall", "specificity"}),
        (MIN_GROUPS - 1, MIN_GROUPS, 1, {"accuracy", "specificity"}),
        (MIN_GROUPS, 3, 1, {"accuracy", "recall"}),
        (4, 4, 20, set()),  # 160 slices, but of eight patients
        (5, 5, 1, {"accuracy"}),
    ],
)
def test_few_patients_are_too_few_to_say(positives: int, negatives: int, slices: int, told: set[str]) -> None:
    labels = np.repeat([1] * positives + [0] * negatives, slices)
    groups = np.repeat(np.arange(positives + negatives), slices)
    (one,) = subgroups(decided(labels, labels, groups), [{"sex": "F"}] * len(labels))
    assert {name for name, figure in one.figures.items() if figure} == told
    assert (one.groups, one.warning) == (positives + negatives, None)


def test_of_two_values_the_worse_one_is_warned_of() -> None:
    labels, groups = np.array([0, 1] * 100), np.arange(200)
    predicted = labels.copy()
    predicted[1:81:2] = 0  # 40 of the 50 positives among the first 100
    traits = [{"sex": "F" if number < 100 else "M"} for number in range(200)]
    female, male = subgroups(decided(labels, predicted, groups), traits)
    assert female.warning == "Sensitivity 0.20, lower than 1.00 elsewhere."
    assert male.warning is None


def test_several_classes_are_compared_by_accuracy() -> None:
    labels, groups = np.arange(240) % 3, np.arange(240)
    predicted = np.where(np.arange(240) < 60, (labels + 1) % 3, labels)
    traits = [{"site": "a" if number < 120 else "b"} for number in range(240)]
    first, second = subgroups(decided(labels, predicted, groups, None), traits)
    assert set(first.figures) == {"accuracy"}
    assert (first.warning, second.warning) == ("Accuracy 0.50, lower than 1.00 elsewhere.", None)


def test_p_values_without_clusters_are_those_of_agresti_and_caffo() -> None:
    """7 of 20 against 15 of 20 by hand. The variance of a mean of 20 is that of 19 with the true mean, so the rates
    are (0.35 * 19 + 1) / 21 and (0.75 * 19 + 1) / 21: t = 0.3619 / 0.1432 = 2.528, and p of Student's t with 37.8
    degrees of freedom is 0.0158."""
    first = module._sample(np.array([True] * 7 + [False] * 13), np.arange(20))
    second = module._sample(np.array([True] * 15 + [False] * 5), np.arange(20))
    assert module._p_value(first, second) == pytest.approx(0.0158, abs=0.0001)


def test_without_traits_there_are_no_subgroups() -> None:
    labels = np.array([0, 1] * 10)
    assert subgroups(decided(labels, labels, np.arange(20)), [{}] * 20) == []


def test_intervals_are_of_the_subgroup() -> None:
    labels = np.array([0, 1] * 30)
    one, _ = subgroups(decided(labels, labels, np.arange(60)), [{"sex": "F"}] * 22 + [{"sex": "M"}] * 38)
    found = share([(True, number) for number in range(11)])
    assert one.figures["recall"] == [1.0, found.low, found.high]


def test_a_training_tells_the_subgroups_of_its_test_scans(tmp_path: Path) -> None:
    files = make_files(8, side=SIDE)
    rows = [f"{name},{number},{'ABC'[number % 2]}" for number, name in enumerate(files)]
    archive = write_zip(
        {**files, "patients.csv": "\n".join(["path,patient,centre", *rows]).encode()}, tmp_path / "d.zip"
    )
    events: list[Event] = []
    runner.run_all(load_config(write_config(tmp_path, archive)), parse_params(SMALL | {"epochs": 1}), events.append)
    (evaluated,) = (event for event in events if isinstance(event, Evaluated))
    found = evaluated.metrics["subgroups"]
    assert {one["trait"] for one in found} == {"centre"}
    assert sum(one["scans"] for one in found) == evaluated.metrics["held_out"]
