"""Splits into training, validation and test scans; patients, copies and near-duplicates stay on one side.

Blank scans only ever train: they would test or calibrate nothing. Those of a patient who tests are on no side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from ml.image.dataset.grouping import group_scans, is_blank
from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import DatasetReport
from ml.runtime.errors import BadDataset

LOCKED = "locked"
"""The side of scans of a locked test set."""


@dataclass(frozen=True)
class Split:
    """Sorted scan indices, int64: to learn from; to choose epoch, temperature and threshold; to evaluate only."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class _Group:
    """Scans that stay together: indices, number of scans per class that are not blank, and what decides the draw."""

    indices: list[int]
    counts: np.ndarray
    name: str


def split_scans(report: DatasetReport, seed: int, test_size: float = 0.2, validation_size: float = 0.1) -> Split:
    """A split stratified by class that keeps groups (see `group_scans`) whole; sizes are fractions of all scans.

    Groups are drawn in the order of a hash of `seed` and the group, first for test, then for validation, until each
    class has its share. So when a dataset grows, test scans of one network rarely become training scans of the next.
    `validation_size` 0 leaves validation empty.
    BadDataset if a class has too few groups to be on every side.
    """
    groups, blank, totals = _groups(report, seed)
    sides = 3 if validation_size else 2
    _require(report, groups, sides, _sizes_remedy(test_size, validation_size))
    test, rest = _draw(groups, totals, test_size, leave=sides - 1)
    validation, train = _draw(rest, totals, validation_size, leave=1) if validation_size else ([], rest)
    split = _split(report, train + blank, validation, test)
    _require_classes(report, split, sides, f"test_size {test_size:g} with validation_size {validation_size:g}")
    return split


def fold_splits(
    report: DatasetReport, seed: int, folds: int, validation_size: float = 0.1, among: Container[int] | None = None
) -> list[Split]:
    """Cross-validation: `folds` stratified splits that test each scan exactly once and keep groups whole.

    `among`: the only scans that they hold; None: all.

    Validation scans are drawn from those that a fold does not test. A hash of `seed` and the group decides its fold,
    unless that fold is full. BadDataset if a class has fewer groups than there are folds.
    """
    groups, blank, totals = _groups(report, seed, among)
    _require_folds(report, groups, folds)
    assigned = _assign_folds(groups, totals, folds, seed)
    splits = []
    for fold in range(folds):
        test = [group for group, at in zip(groups, assigned, strict=True) if at == fold]
        rest = [group for group, at in zip(groups, assigned, strict=True) if at != fold]
        validation, train = _draw(rest, totals, validation_size, leave=1) if validation_size else ([], rest)
        splits.append(_split(report, train + blank, validation, test))
        sides = 3 if validation_size else 2
        _require_classes(report, splits[-1], sides, f"folds {folds} with validation_size {validation_size:g}")
    return splits


def split_by_folders(report: DatasetReport, seed: int, validation_size: float = 0.1) -> Split:
    """The sides that folders such as train and test, or patients.csv, say.

    Validation is drawn from train by groups, as in `split_scans`, if no scan is on that side.
    Patients on several sides stay there; `ml.image.dataset.lineage.leaks` counts them.
    BadDataset if a scan is on no side, or a class is missing on one.
    """
    train, validation, test = (
        [index for index, scan in enumerate(report.scans) if scan.side == side]
        for side in ("train", "validation", "test")
    )
    if homeless := report.images - len(train) - len(validation) - len(test):
        raise BadDataset(
            f"split is folders, but {homeless} scans lie in no folder of train, validation or test, and patients.csv "
            "gives them no split: complete it, or set split to patients."
        )
    if not validation and validation_size:
        groups, blank, totals = _groups(report, seed, set(train))
        drawn, rest = _draw(groups, totals, validation_size, leave=1)
        train, validation = _indices(rest + blank), _indices(drawn)
    split = _without_blanks(report, train, validation, test)
    _require_classes(report, split, 3 if validation_size else 2, "split folders")
    return split


def split_locked(report: DatasetReport, seed: int, validation_size: float = 0.1) -> Split:
    """The scans of a locked test set test, and nothing else does; validation is drawn from the others, as above.

    Others that belong together with a locked scan (a patient, a copy, a near-duplicate) are on no side.
    BadDataset if a class has too few groups left to learn from.
    """
    belongs = group_scans(report.scans)
    test = [index for index, scan in enumerate(report.scans) if scan.side == LOCKED]
    known = set(belongs[test].tolist())
    among = {index for index, group in enumerate(belongs) if int(group) not in known}
    groups, blank, totals = _groups(report, seed, among)
    sides = 2 if validation_size else 1
    _require(report, groups, sides, f"beside the locked test set {sides} are needed to learn from: add more.")
    validation, train = _draw(groups, totals, validation_size, leave=1) if validation_size else ([], groups)
    split = _without_blanks(report, _indices(train + blank), _indices(validation), test)
    _require_classes(report, split, 3 if validation_size else 2, "a locked test set")
    return split


# --- drawing ---------------------------------------------------------------------------------------------------------


def _groups(
    report: DatasetReport, seed: int, among: Container[int] | None = None
) -> tuple[list[_Group], list[_Group], np.ndarray]:
    """Groups in the order in which they are drawn; those of blank scans only; and scans per class, without blank ones.

    `among`: the only scans to count and to draw.
    """
    by_number: dict[int, list[int]] = {}
    for index, group in enumerate(group_scans(report.scans)):
        if among is not None and index not in among:
            continue
        by_number.setdefault(int(group), []).append(index)
    labels, shown, classes = report.labels, ~_blank_scans(report), len(report.classes)
    groups = [
        _Group(indices, _counts(labels[indices][shown[indices]], classes), _name(report.scans, indices))
        for indices in by_number.values()
    ]
    drawn = sorted((group for group in groups if group.counts.any()), key=lambda group: _draw_key(seed, group.name))
    totals = np.sum([group.counts for group in groups], axis=0)
    return drawn, [group for group in groups if not group.counts.any()], totals


def _counts(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=classes)


def _blank_scans(report: DatasetReport) -> np.ndarray:
    """Which scans are blank: bool [images]."""
    return np.array([is_blank(scan) for scan in report.scans], dtype=bool)


def _name(scans: Sequence[ScanFile], indices: list[int]) -> str:
    return min(scans[index].patient or scans[index].sha256 for index in indices)


def _draw_key(seed: int | str, name: str) -> str:
    """Decides when a group is drawn: by the seed and the group alone, not by the rest of the dataset."""
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def _draw(groups: list[_Group], totals: np.ndarray, size: float, leave: int) -> tuple[list[_Group], list[_Group]]:
    """(drawn, rest): in order, each group that keeps all of its classes near their share of `totals`.

    If possible, at least one group of each class is drawn and at least `leave` groups of it remain.
    """
    share, drawn = np.rint(size * totals), np.zeros(len(groups), dtype=bool)
    held, left = np.zeros_like(share), np.sum([group.counts > 0 for group in groups], axis=0)

    def take(number: int) -> None:
        nonlocal held, left
        drawn[number] = True
        held, left = held + groups[number].counts, left - (groups[number].counts > 0)

    for number, group in enumerate(groups):
        has = group.counts > 0
        if np.all((held + group.counts / 2 <= share)[has]) and np.all(left[has] > leave):
            take(number)
    for label in range(len(totals)):  # a class of which every group is larger than its share
        spare = [n for n, group in enumerate(groups) if group.counts[label] and np.all(left[group.counts > 0] > leave)]
        if not held[label] and spare:
            take(min(spare, key=lambda number: len(groups[number].indices)))
    chosen = [group for group, taken in zip(groups, drawn, strict=True) if taken]
    return chosen, [group for group, taken in zip(groups, drawn, strict=True) if not taken]


def _assign_folds(groups: list[_Group], totals: np.ndarray, folds: int, seed: int) -> list[int]:
    """Each group's fold. Large groups are placed first, so that small ones can even out the loads."""
    loads, share = np.zeros((folds, len(totals))), totals / folds
    remaining = np.sum([group.counts > 0 for group in groups], axis=0)
    folds_of = [0] * len(groups)
    for number in sorted(range(len(groups)), key=lambda number: -len(groups[number].indices)):
        group = groups[number]
        has = group.counts > 0
        wanted = int(_draw_key(f"fold {seed}", group.name)[:8], 16) * folds >> 32
        allowed = _allowed(loads, remaining, has)
        if not (allowed[wanted] and np.all((loads[wanted] + group.counts / 2 <= share)[has])):
            load = (loads / totals)[:, has].sum(axis=1)
            wanted = int(np.argmin(np.where(allowed, load, np.inf)))
        folds_of[number] = wanted
        loads[wanted] += group.counts
        remaining = remaining - has
    return folds_of


def _allowed(loads: np.ndarray, remaining: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Folds that a group with the classes `has` may go to: only empty ones if a class has barely enough groups left."""
    allowed = np.ones(len(loads), dtype=bool)
    for label in np.flatnonzero(has):
        empty = loads[:, label] == 0
        if remaining[label] <= empty.sum() and np.any(allowed & empty):
            allowed &= empty
    return allowed


def _split(report: DatasetReport, train: list[_Group], validation: list[_Group], test: list[_Group]) -> Split:
    return _without_blanks(report, _indices(train), _indices(validation), _indices(test))


def _indices(groups: list[_Group]) -> list[int]:
    return [index for group in groups for index in group.indices]


def _without_blanks(report: DatasetReport, train: list[int], validation: list[int], test: list[int]) -> Split:
    """The split of these scans, without blank ones in validation and test."""
    learned, *unseen = (np.sort(np.array(side, dtype=np.int64)) for side in (train, validation, test))
    blank = _blank_scans(report)
    return Split(learned, *(side[~blank[side]] for side in unseen))


# --- refusals -------------------------------------------------------------------------------------------------------


def _available(groups: list[_Group], classes: int) -> np.ndarray:
    """Groups with scans of each class, int [classes]; there may be no groups, if all scans are blank."""
    return sum((group.counts > 0 for group in groups), np.zeros(classes, np.int64))


def _noun(report: DatasetReport) -> str:
    if report.scans and all(scan.study for scan in report.scans) and not any(scan.patient for scan in report.scans):
        return "studies"
    return "patients" if any(scan.patient for scan in report.scans) else "different scans"


def _sizes_remedy(test_size: float, validation_size: float) -> str:
    if validation_size:
        return (
            f"test_size {test_size:g} and validation_size {validation_size:g} need 3, one each to train, to validate "
            "and to test on: add more, or set validation_size to 0, which needs 2."
        )
    return f"test_size {test_size:g} needs 2, one to train and one to test on: add more."


def _require(report: DatasetReport, groups: list[_Group], least: int, remedy: str) -> None:
    for name, count in zip(report.names, _available(groups, len(report.names)), strict=True):
        if count < least:
            noun = _noun(report)
            list_them = " If patients are told wrongly, list them in patients.csv." if noun != "different scans" else ""
            raise BadDataset(f"Class {name} has too few {noun} ({count}): {remedy}{list_them}")


def _require_folds(report: DatasetReport, groups: list[_Group], folds: int) -> None:
    available = _available(groups, len(report.names))
    rarest = int(np.argmin(available))
    most = int(available[rarest])
    if folds > most:
        remedy = f"use at most {most}" if most > 1 else "add more of them"
        raise BadDataset(
            f"folds: {folds} is more than the {most} {_noun(report)} of class {report.names[rarest]}; {remedy}."
        )


def _require_classes(report: DatasetReport, split: Split, sides: int, asked: str) -> None:
    """Checks the result: patients with scans of several classes can leave a side without a class despite the counts."""
    labels = report.labels
    for what, side in (("train", split.train), ("test", split.test), ("validate", split.validation))[:sides]:
        missing = set(range(len(report.names))) - set(labels[side].tolist())
        if missing:
            remedy = ", or set validation_size to 0." if sides > 2 else "."
            name, noun = report.names[min(missing)], _noun(report)
            raise BadDataset(f"{asked} leaves no {name} to {what} on: add scans of more {noun}{remedy}")
