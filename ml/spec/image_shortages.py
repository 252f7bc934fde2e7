"""Which parameters of a training a dataset is too thin for, as far as its check has counted it.

Only what is certain to fail is refused, when the training is submitted: the split itself (`ml.image.dataset.splits`)
knows more, and may still fail. The keys of a check's inspection are those of `ml.image.dataset.inspection.Inspection`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ml.spec.image import Params
from ml.spec.pipeline import DatasetFacts

SIDES = ("train", "test")
"""Sides of a split that no training draws by itself where folders or patients.csv say them."""


def shortages(params: Params, dataset: DatasetFacts) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and what to do) for parameters that ask for more than the dataset has."""
    names = sorted(dataset.classes)
    if params.classes is not None and params.classes != len(names):
        yield "classes", f"The dataset has {len(names)} ({', '.join(names)}): set classes to it, or leave it out."
    if dataset.tested_on is not None:
        yield from _wrong_beside_a_locked_test(params, dataset)
    elif params.split == "folders":
        yield from _missing_sides(dataset)
    else:
        yield from _too_few_groups(params, dataset)


def _wrong_beside_a_locked_test(params: Params, dataset: DatasetFacts) -> Iterator[tuple[str, str]]:
    for field, given in (("folds", params.folds > 0), ("split", params.split == "folders")):
        if given:
            yield field, "Leave it out, or test_dataset_id: the dataset that this names is all that is tested on."
    ours, theirs = (", ".join(sorted(classes)) for classes in (dataset.classes, dataset.tested_on or ()))
    if ours != theirs:
        yield "test_dataset_id", f"Its classes are {theirs}, not {ours}."
    for name, count in _groups(dataset):
        if count < 2:
            yield "test_dataset_id", _refusal(name, count, "2 are needed, one each to train and to validate on")


def _missing_sides(dataset: DatasetFacts) -> Iterator[tuple[str, str]]:
    sides: Mapping[str, int] | None = dataset.inspection.get("sides")
    if sides is None:  # the check is of an older release
        return
    homeless = sum(dataset.classes.values()) - sum(sides.values())
    missing = [side for side in SIDES if not sides.get(side)]
    if homeless > 0 or missing:
        what = f"no scan is on the side {missing[0]}" if missing else f"{homeless} scans are on no side"
        yield (
            "split",
            f"In this dataset {what} by its folders or patients.csv. Complete them, or set split to patients.",
        )


def _too_few_groups(params: Params, dataset: DatasetFacts) -> Iterator[tuple[str, str]]:
    groups = list(_groups(dataset))
    for name, count in groups:
        if count < 3:
            yield "test_size", _refusal(name, count, "3 are needed, one each to train, to validate and to test on")
            return
    for name, count in groups if params.folds else ():
        left = count - _tested(params, dataset, name, count)
        if not _suffice(left, params.folds):
            most = max((folds for folds in range(2, left + 1) if _suffice(left, folds)), default=0)
            yield (
                "folds",
                f"Class {name} has {count} independent patients or scans, of which {left} are left beside the test: "
                f"set folds to {most}, or add more.",
            )
            return


def _groups(dataset: DatasetFacts) -> Iterator[tuple[str, int]]:
    """Each class with its number of independent groups; nothing where the check has not counted them."""
    counted: Mapping[str, int] | None = dataset.inspection.get("groups")
    if counted is not None:
        yield from sorted((name, counted.get(name, 0)) for name in dataset.classes)


def _tested(params: Params, dataset: DatasetFacts, name: str, count: int) -> int:
    """How many of a class's groups the test takes at least: one, or its share if each group is one scan."""
    alone = count == dataset.classes[name] and not dataset.inspection.get("patients_with_several_labels")
    return max(1, min(round(params.test_size * count), count - 2)) if alone else 1


def _suffice(groups: int, folds: int) -> bool:
    """Whether each fold can test one of a class's groups, and leave one to train and one to validate on."""
    return folds <= groups and groups - math.ceil(groups / folds) >= 2


def _refusal(name: str, count: int, need: str) -> str:
    return f"Class {name} has {count} independent patients or scans: {need}. Add more to the dataset."
