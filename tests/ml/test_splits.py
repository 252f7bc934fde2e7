"""Splits and cross-validation folds; lineage and leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ml.image.dataset.grouping import group_scans
from ml.image.dataset.lineage import Leaks, leaks, lineage
from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import DatasetReport, check_dataset
from ml.image.dataset.splits import Split, fold_splits, split_scans
from ml.runtime.archives import extract_zip
from ml.runtime.errors import BadDataset, ModelFileError
from tests.processes import DATA

KIDNEY = ("Cyst", "Normal", "Stone", "Tumor")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of(text: str, bits: int = 0) -> str:
    """A perceptual hash; those of other texts are far away; `bits` of its bits are flipped."""
    number = int(sha(text), 16) ^ ((1 << bits) - 1) << 100
    return f"{number:064x}"


def make_scan(label: str, name: str, patient: str | None = None, **fields: object) -> ScanFile:
    whose = sha(patient)[:16] if patient else None
    return ScanFile(
        f"{label}/{name}.png",
        label,
        **{"sha256": sha(name), "patient": whose, "perceptual_hash": hash_of(name), **fields},
    )


def report_of(*scans: ScanFile) -> DatasetReport:
    ordered = tuple(sorted(scans, key=lambda scan: (scan.label, scan.path)))
    counts = dict(sorted(Counter(scan.label for scan in scans).items()))
    return DatasetReport(counts, len(scans), "digest", (), ordered)


def make_report(patients: int, slices: int = 5, classes: tuple[str, ...] = ("Normal", "Tumor")) -> DatasetReport:
    """Each patient has `slices` scans of one class."""
    return report_of(
        *(
            make_scan(classes[patient % len(classes)], f"{patient}-{index}", f"patient {patient}")
            for patient in range(patients)
            for index in range(slices)
        )
    )


def make_scans(counts: dict[str, int]) -> DatasetReport:
    """Different scans of unknown patients."""
    return report_of(*(make_scan(label, f"{label} {i}") for label, count in counts.items() for i in range(count)))


def sides(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return split.train, split.validation, split.test


def shared(report: DatasetReport, split: Split) -> set[int]:
    """Groups with scans on two sides."""
    groups = group_scans(report.scans)
    train, validation, test = (set(groups[side].tolist()) for side in sides(split))
    return train & validation | train & test | validation & test


def per_class(report: DatasetReport, side: np.ndarray) -> list[int]:
    return np.bincount(report.labels[side], minlength=len(report.names)).tolist()


def paths_tested(report: DatasetReport, split: Split) -> set[str]:
    return {report.scans[index].path for index in split.test}


# --- properties ---


@st.composite
def datasets(draw: st.DrawFn) -> DatasetReport:
    """2 to 4 classes; patients of 1 to 6 scans, some of two classes; copies and near-duplicates; unknown patients."""
    classes = KIDNEY[: draw(st.integers(2, 4))]
    scans = []
    for number in range(draw(st.integers(12, 40))):
        patient = draw(st.sampled_from([None, f"patient {number}"]))
        label = classes[number % len(classes)]
        for index in range(draw(st.integers(1, 6))):
            name = f"{number}-{index}"
            kind = draw(st.sampled_from(["own", "own", "own", "copy", "near", "other class"]))
            same = f"{draw(st.integers(0, number))}-0"
            fields: dict[str, object] = {}
            if kind == "copy":
                fields = {"sha256": sha(same), "perceptual_hash": hash_of(same)}
            elif kind == "near":
                fields = {"perceptual_hash": hash_of(same, draw(st.integers(1, 9)))}
            where = draw(st.sampled_from(classes)) if kind == "other class" else label
            scans.append(make_scan(where, name, patient, **fields))
    report = report_of(*scans)
    assume(len(report.names) == len(classes))
    return report


def split_or_none(report: DatasetReport, *args: object) -> Split | None:
    try:
        return split_scans(report, *args)  # type: ignore[arg-type]
    except BadDataset:
        return None


@settings(max_examples=60, deadline=None)
@given(datasets(), st.integers(0, 99), st.sampled_from([0.1, 0.2, 0.4]), st.sampled_from([0.0, 0.1, 0.3]))
def test_no_group_is_on_two_sides_and_every_scan_is_on_one(report, seed, test_size, validation_size):
    split = split_or_none(report, seed, test_size, validation_size)
    assume(split is not None)
    assert not shared(report, split)
    assert sorted(np.concatenate(sides(split)).tolist()) == list(range(report.images))
    for side in sides(split) if validation_size else (split.train, split.test):
        assert min(per_class(report, side)) > 0
        assert side.dtype == np.int64
        assert np.all(np.diff(side) > 0)
    assert leaks(report, split) == Leaks()


@settings(max_examples=40, deadline=None)
@given(datasets(), st.integers(0, 99), st.integers(2, 5), st.sampled_from([0.0, 0.1]))
def test_each_scan_is_tested_by_one_fold(report, seed, folds, validation_size):
    try:
        splits = fold_splits(report, seed, folds, validation_size)
    except BadDataset:
        assume(False)
    assert sorted(np.concatenate([split.test for split in splits]).tolist()) == list(range(report.images))
    for split in splits:
        assert not shared(report, split)
        assert sorted(np.concatenate(sides(split)).tolist()) == list(range(report.images))
        assert min(per_class(report, split.test)) > 0
        assert min(per_class(report, split.train)) > 0
        assert (len(split.validation) > 0) == (validation_size > 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=3, max_size=9), min_size=2, max_size=4), st.integers(0, 99))
def test_three_patients_of_each_class_are_always_enough_whatever_their_sizes(sizes, seed):
    report = report_of(
        *(
            make_scan(KIDNEY[label], f"{label} {patient} {index}", f"{label} {patient}")
            for label, patients in enumerate(sizes)
            for patient, slices in enumerate(patients)
            for index in range(slices)
        )
    )
    split = split_scans(report, seed)
    assert all(min(per_class(report, side)) > 0 for side in sides(split))
    folds = fold_splits(report, seed, min(map(len, sizes)), 0)
    assert all(min(per_class(report, side)) > 0 for one in folds for side in (one.train, one.test))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_a_growing_dataset_keeps_most_places(seed):
    small, large = make_report(60, 3), make_report(75, 3)
    before, after = split_scans(small, seed), split_scans(large, seed)
    kept = paths_tested(small, before) & {large.scans[index].path for index in after.train}
    assert len(kept) <= 0.35 * len(before.test)  # by lot alone, 0.7 of them would come to be trained on
    old, new = ([paths_tested(report, one) for one in fold_splits(report, seed, 5)] for report in (small, large))
    assert sum(len(a & b) for a, b in zip(old, new, strict=True)) > 0.5 * small.images  # by lot alone: 0.2


# --- sizes ---


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("test_size", "validation_size"), [(0.2, 0.1), (0.3, 0.1), (0.5, 0.2), (0.05, 0.05), (0.2, 0)])
def test_the_sides_have_the_sizes_that_were_asked_for(test_size, validation_size, seed):
    report = make_report(160, 4, KIDNEY)
    split = split_scans(report, seed, test_size, validation_size)
    assert len(split.test) / report.images == pytest.approx(test_size, abs=0.03)
    assert len(split.validation) / report.images == pytest.approx(validation_size, abs=0.03)
    assert not shared(report, split)


def test_without_patients_the_split_is_stratified_to_the_scan():
    report = make_scans({"Normal": 240, "Tumor": 225})
    split = split_scans(report, seed=0)
    assert [per_class(report, side) for side in sides(split)] == [[168, 158], [24, 22], [48, 45]]


def test_four_unequal_classes_are_stratified_each():
    report = make_scans({"Cyst": 370, "Normal": 507, "Stone": 137, "Tumor": 228})
    assert per_class(report, split_scans(report, 1).test) == [74, 101, 27, 46]
    folds = fold_splits(report, 1, 5)
    for label, count in enumerate((370, 507, 137, 228)):
        assert all(abs(per_class(report, split.test)[label] - count / 5) <= 1 for split in folds)


def test_a_validation_size_of_0_leaves_validation_empty():
    split = split_scans(make_scans({"Normal": 20, "Tumor": 20}), 0, 0.2, 0)
    assert (len(split.train), len(split.validation), len(split.test)) == (32, 0, 8)
    assert split.validation.dtype == np.int64


def test_five_scans_of_each_class_are_enough():
    report = make_scans(dict.fromkeys(KIDNEY, 5))
    assert [per_class(report, side) for side in sides(split_scans(report, 0))] == [[3] * 4, [1] * 4, [1] * 4]


def test_a_patient_that_is_most_of_the_class_is_trained_on():
    crowd = [make_scan("Tumor", f"crowd {i}", "crowd") for i in range(50)]
    few = [make_scan("Tumor", f"few {i}", f"few {i}") for i in range(2)]
    normal = [make_scan("Normal", f"normal {i}") for i in range(50)]
    report = report_of(*crowd, *few, *normal)
    for seed in range(10):
        assert [per_class(report, side)[1] for side in sides(split_scans(report, seed))] == [50, 1, 1]


# --- groups ---


def test_the_seed_decides_the_split_and_nothing_else_does():
    report = make_report(40)
    assert np.array_equal(split_scans(report, 3).test, split_scans(report, 3).test)
    assert not np.array_equal(split_scans(report, 3).test, split_scans(report, 4).test)
    assert not np.array_equal(fold_splits(report, 3, 4)[0].test, fold_splits(report, 4, 4)[0].test)


def test_names_of_files_do_not_matter():
    report = make_scans({"Normal": 50, "Tumor": 50})
    renamed = report_of(*(ScanFile(f"x/{scan.sha256}", scan.label, scan.sha256, None) for scan in report.scans))
    before = {report.scans[index].sha256 for index in split_scans(report, 0).test}
    assert before == {renamed.scans[index].sha256 for index in split_scans(renamed, 0).test}


def test_patient_copies_and_near_duplicates_join_groups_through_third_scans():
    first, second = make_scan("Tumor", "1", "Anna"), make_scan("Tumor", "2", "Anna")
    copy = make_scan("Tumor", "3", "Berta", sha256=second.sha256)
    near = make_scan("Normal", "4", None, perceptual_hash=hash_of("3", 9))
    other = make_scan("Normal", "5", "Clara")
    groups = group_scans([first, second, copy, near, other])
    assert len(set(groups[:4].tolist())) == 1
    assert groups[4] not in groups[:4]


def test_blank_scans_do_not_make_two_patients_one():
    scans = [
        make_scan("Normal", f"{i}", f"{i // 2}", **({"sha256": "0", "perceptual_hash": ""} if i % 2 else {}))
        for i in range(20)
    ]
    assert len(set(group_scans(scans).tolist())) == 10


def test_studies_and_links_join_scans():
    first, second = make_scan("Tumor", "1", None, study="s1"), make_scan("Normal", "2", None, study="s1", links=("l1",))
    third, other = make_scan("Normal", "3", "Anna", links=("l1",)), make_scan("Normal", "4", "Berta", study="s2")
    groups = group_scans([first, second, third, other])
    assert len(set(groups[:3].tolist())) == 1
    assert groups[3] != groups[0]


def test_scans_without_a_hash_are_grouped_by_patient_and_content():
    scans = [
        ScanFile("a", "Normal", "1", None),
        ScanFile("b", "Normal", "1", "x"),
        ScanFile("c", "Normal", "2", "x"),
        ScanFile("d", "Normal", "3", None),
    ]
    assert group_scans(scans).tolist() == [0, 0, 0, 1]


# --- blank scans ---


def test_blank_scans_alone_are_too_few_to_split():
    report = report_of(*(replace(scan, perceptual_hash="") for scan in make_report(20).scans))
    for split in (lambda: split_scans(report, 0), lambda: fold_splits(report, 0, 3)):
        with pytest.raises(BadDataset, match="Normal"):
            split()


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 99), max_size=30), st.integers(0, 99))
def test_blank_scans_never_test_or_calibrate_and_the_others_are_on_one_side(blank, seed):
    scans = make_report(20).scans
    report = report_of(
        *(replace(scan, perceptual_hash="") if index in blank else scan for index, scan in enumerate(scans))
    )
    split = split_or_none(report, seed)
    assume(split is not None)
    assert split is not None
    others = [index for index in range(100) if index not in blank]
    assert set(others) <= set(np.concatenate(sides(split)).tolist())
    assert not blank & {*split.validation.tolist(), *split.test.tolist()}
    assert not leaks(report, split).any
    for fold in fold_splits(report, seed, 3, 0):
        assert not blank & set(fold.test.tolist())


# --- too few ---


def test_too_few_patients_are_refused_with_the_parameters_and_the_remedy():
    with pytest.raises(
        BadDataset, match=r"Class Tumor has too few patients \(2\): test_size 0.2 and validation_size 0.1"
    ):
        split_scans(make_report(5), seed=0)
    with pytest.raises(BadDataset, match=r"set validation_size to 0, which needs 2"):
        split_scans(make_report(4), seed=0)
    split_scans(make_report(4), 0, 0.2, 0)
    with pytest.raises(BadDataset, match=r"patients \(1\): test_size 0.2 needs 2"):
        split_scans(make_report(2), 0, 0.2, 0)


def test_copies_are_not_different_scans():
    copies = [make_scan("Tumor", f"{i}", sha256=sha("one"), perceptual_hash=hash_of("one")) for i in range(9)]
    with pytest.raises(BadDataset, match=r"Class Tumor has too few different scans \(1\)"):
        split_scans(report_of(*copies, *make_scans({"Normal": 9}).scans), 0)


def test_patients_of_every_class_that_are_too_few_for_all_sides_are_refused():
    scans = [
        make_scan(label, f"{label} {p} {i}", f"{p}")
        for p in range(2)
        for label in ("Normal", "Tumor")
        for i in range(5)
    ]
    single = [make_scan("Normal", "n", "n"), make_scan("Tumor", "t", "t")]
    for seed in range(10):
        split = split_or_none(report_of(*scans, *single), seed)
        assert split is None or all(min(per_class(report_of(*scans, *single), side)) > 0 for side in sides(split))


def test_more_folds_than_patients_are_refused_with_the_most_that_there_can_be():
    report = make_report(13)  # 7 Normal, 6 Tumor
    with pytest.raises(BadDataset, match="folds: 10 is more than the 6 patients of class Tumor; use at most 6"):
        fold_splits(report, 0, 10)
    assert len(fold_splits(report, 0, 6)) == 6
    with pytest.raises(BadDataset, match="folds: 3 is more than the 2 different scans of class Tumor; use at most 2"):
        fold_splits(make_scans({"Normal": 9, "Tumor": 2}), 0, 3)
    with pytest.raises(BadDataset, match="add more of them"):
        fold_splits(make_scans({"Normal": 9, "Tumor": 1}), 0, 2)


def test_folds_that_leave_nothing_to_validate_on_are_refused_with_the_remedy():
    report = make_scans({"Normal": 9, "Tumor": 2})
    with pytest.raises(BadDataset, match=r"leaves no Tumor to validate on: .* set validation_size to 0"):
        fold_splits(report, 0, 2)
    assert len(fold_splits(report, 0, 2, 0)) == 2


# --- leaks ---

TRAINED = make_scan("Tumor", "trained", "Anna", study=sha("CT 1")[:16], links=(sha("series")[:16],))


def leaks_of(test: ScanFile, learned: ScanFile = TRAINED) -> Leaks:
    report = DatasetReport({"Tumor": 3}, 3, "", (), (learned, make_scan("Tumor", "validation"), test))
    return leaks(report, Split(np.array([0]), np.array([1]), np.array([2])))


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (make_scan("Tumor", "other", "Berta"), Leaks()),
        (make_scan("Tumor", "other", None), Leaks()),
        (make_scan("Tumor", "other", "Anna"), Leaks(patients=1)),
        (make_scan("Normal", "trained", None), Leaks(duplicates=1)),
        (make_scan("Tumor", "other", None, perceptual_hash=hash_of("trained", 18)), Leaks(near_duplicates=1)),
        (make_scan("Tumor", "other", None, perceptual_hash=hash_of("trained", 19)), Leaks()),
        (make_scan("Tumor", "trained", "Anna"), Leaks(patients=1, duplicates=1)),
        (make_scan("Tumor", "validation", "Berta"), Leaks(duplicates=1)),
        (make_scan("Tumor", "other", None, study=sha("CT 1")[:16]), Leaks(studies=1)),
        (make_scan("Tumor", "other", "Anna", study=sha("CT 1")[:16]), Leaks(patients=1)),
        (make_scan("Tumor", "other", None, study=sha("CT 2")[:16]), Leaks()),
        (make_scan("Tumor", "other", None, links=(sha("series")[:16],)), Leaks(studies=1)),
        (make_scan("Tumor", "other", None, links=(sha("CT 1")[:16],)), Leaks(studies=1)),
    ],
)
def test_each_kind_of_leak_is_counted(test, expected):
    assert leaks_of(test) == expected
    assert leaks_of(test).any == (expected != Leaks())


def test_black_pictures_are_no_leak():
    black = {"sha256": sha("black"), "perceptual_hash": ""}
    assert not leaks_of(make_scan("Tumor", "b", "Berta", **black), make_scan("Tumor", "a", "Anna", **black)).any


def test_what_the_weights_have_learned_from_counts_too():
    old = report_of(make_scan("Tumor", "a", "Anna"), make_scan("Tumor", "b"), make_scan("Tumor", "c"))
    new = report_of(
        make_scan("Tumor", "a2", "Anna"),
        make_scan("Tumor", "b"),
        make_scan("Tumor", "c2", perceptual_hash=hash_of("c", 5)),
        make_scan("Tumor", "d"),
    )
    split = Split(np.array([], np.int64), np.array([], np.int64), np.arange(4))
    ancestors = json.loads(json.dumps(lineage(old, range(3))))
    assert leaks(new, split) == Leaks()
    assert leaks(new, split, ancestors) == Leaks(patients=1, duplicates=1, near_duplicates=1)


def test_a_study_that_the_weights_have_learned_from_counts_too():
    old = report_of(make_scan("Tumor", "a", None, study=sha("CT 1")[:16]), make_scan("Tumor", "b", "Anna"))
    new = report_of(make_scan("Tumor", "c", None, study=sha("CT 1")[:16]), make_scan("Tumor", "d"))
    split = Split(np.array([], np.int64), np.array([], np.int64), np.arange(2))
    assert leaks(new, split, lineage(old, range(2))) == Leaks(studies=1)
    assert leaks(new, split, lineage(old, [1])) == Leaks()


def test_a_lineage_is_sorted_compact_and_holds_no_name():
    report = make_report(10)
    tokens = lineage(report, range(50))
    assert list(tokens) == sorted(set(tokens))
    assert max(map(len, tokens)) <= 100
    with_study = report_of(make_scan("Tumor", "a", "Anna", study=sha("CT 1")[:16]))
    assert len(lineage(with_study, [0])[0]) <= 115
    assert lineage(report, reversed(range(50))) == tokens
    assert not any(scan.path in token or scan.label in token for scan in report.scans for token in tokens)


def test_scans_without_hash_and_patient_have_a_lineage():
    report = report_of(ScanFile("a", "Normal", sha("a"), None), make_scan("Normal", "b", None, perceptual_hash=""))
    split = Split(np.array([], np.int64), np.array([], np.int64), np.arange(2))
    assert leaks(report, split, lineage(report, range(2))) == Leaks(duplicates=1)


@pytest.mark.parametrize("token", ["", "x", "0123", "0123456789abcdef", "0123456789abcdef.zz.", "a.b.c.d"])
def test_a_foreign_lineage_is_refused(token):
    report = make_report(10)
    with pytest.raises(ModelFileError, match="lineage"):
        leaks(report, split_scans(report, 0), [token])


def test_reasons_are_sentences_with_counts_only():
    assert Leaks().reasons() == []
    assert Leaks(1, 2, 3, 4).reasons() == [
        "1 test scan is of patients of whom other scans were trained on.",
        "4 test scans are of studies of which other scans were trained on.",
        "2 test scans are copies of scans that were trained on.",
        "3 test scans are near-duplicates of scans that were trained on.",
    ]


@pytest.mark.skipif(not (DATA / "mri-465.zip").exists(), reason="shared/data is not here")
def test_real_slices_are_split_without_a_leak(tmp_path):
    extract_zip(DATA / "mri-465.zip", tmp_path)
    report = check_dataset(tmp_path)
    assert max(Counter(group_scans(report.scans).tolist()).values()) == 5
    for seed in range(3):
        split = split_scans(report, seed)
        assert len(split.test) == pytest.approx(93, abs=2)
        assert not leaks(report, split).any
        assert leaks(report, split, lineage(report, split.test)).duplicates == len(split.test)
        assert not any(leaks(report, fold).any for fold in fold_splits(report, seed, 5))
