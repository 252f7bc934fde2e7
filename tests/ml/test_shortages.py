"""What a dataset is too thin for is refused when a training is submitted, and nothing that the split would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ml.image.dataset.grouping import group_scans
from ml.image.dataset.splits import fold_splits, split_scans
from ml.runtime.config import parse_params
from ml.runtime.errors import BadDataset
from ml.spec.image_shortages import shortages
from ml.spec.pipeline import DatasetFacts
from tests.ml.test_splits import make_report, make_scans

COUNTS = {"Normal": 20, "Tumor": 20}


def found(counts: Mapping[str, int], inspection: Mapping[str, Any] = {}, tested_on: Any = None, **params: Any) -> list:
    facts = DatasetFacts(counts, inspection, tested_on)
    return list(shortages(parse_params({"weights": "none", **params}), facts))


def fields(*given: Any, **params: Any) -> list[str]:
    return [field for field, _ in found(*given, **params)]


def test_a_number_of_classes_that_the_dataset_does_not_have() -> None:
    assert fields(COUNTS, classes=2) == []
    ((field, text),) = found(COUNTS, classes=3)
    assert (field, text[:34]) == ("classes", "The dataset has 2 (Normal, Tumor):")


def test_too_few_groups_of_a_class_for_three_sides() -> None:
    assert fields(COUNTS, {"groups": {"Normal": 20, "Tumor": 3}}) == []
    ((field, text),) = found(COUNTS, {"groups": {"Normal": 20, "Tumor": 2}})
    assert field == "test_size"
    assert "Class Tumor has 2 independent patients or scans: 3 are needed" in text


def test_sides_that_folders_do_not_say() -> None:
    sides = {"train": 30, "test": 10}
    assert fields(COUNTS, {"sides": sides}, split="folders") == []
    assert fields(COUNTS, {"sides": {"train": 40}}, split="folders") == ["split"]
    assert fields(COUNTS, {"sides": {"train": 20, "test": 10}}, split="folders") == ["split"]
    assert fields(COUNTS, {"sides": {}, "groups": {"Normal": 1, "Tumor": 1}}, split="folders") == ["split"]


def test_beside_a_locked_test_set() -> None:
    groups = {"groups": {"Normal": 2, "Tumor": 2}}
    assert fields(COUNTS, groups, {"Normal": 5, "Tumor": 5}) == []
    assert fields(COUNTS, groups, {"Normal": 5, "Cyst": 5}) == ["test_dataset_id"]
    assert fields(COUNTS, groups, {"Normal": 5, "Tumor": 5}, folds=3) == ["folds"]
    assert fields(COUNTS, {"groups": {"Normal": 1, "Tumor": 9}}, {"Normal": 5, "Tumor": 5}) == ["test_dataset_id"]


def test_a_check_of_an_older_release_refuses_nothing() -> None:
    assert fields(COUNTS, {}, folds=20) == fields(COUNTS, {}, split="folders") == []


@pytest.mark.parametrize("test_size", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("folds", [0, 2, 3, 5, 8])
@pytest.mark.parametrize("slices", [1, 3])
def test_what_is_refused_could_not_be_split(slices: int, folds: int, test_size: float) -> None:
    """By patients of several scans the split may still fail: of these no more is known. Single scans it knows."""
    for each in range(1, 14):
        report = make_scans({"Normal": each, "Tumor": 30}) if slices == 1 else make_report(2 * each, slices)
        groups = group_scans(report.scans)
        counted = {
            name: len({int(group) for group, scan in zip(groups, report.scans, strict=True) if scan.label == name})
            for name in report.names
        }
        refused = bool(fields(report.classes, {"groups": counted}, folds=folds, test_size=test_size))
        try:
            split = split_scans(report, 0, test_size, 0.1)
            if folds:
                fold_splits(report, 0, folds, 0.1, {*split.train.tolist(), *split.validation.tolist()})
            fails = False
        except BadDataset:
            fails = True
        assert not refused or fails, f"{each} groups were refused and could be split"
        assert slices > 1 or refused == fails, f"{each} scans fail later"
