"""Whose scan is it: what DICOM, names and patients.csv tell, and that no split divides it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ml.image.dataset.evidence import Evidence, Weighed, weigh
from ml.image.dataset.lineage import Leaks, leaks
from ml.image.dataset.patient_list import Listed
from ml.image.dataset.scans import DatasetReport, check_dataset
from ml.image.dataset.splits import Split, fold_splits, split_scans
from ml.runtime.errors import BadDataset
from tests.ml.builders import encode, make_dicom, make_files, make_pixels, write_folder
from tests.ml.patient_sets import KINDS, anonymous_studies, one_identity, unknown

LABELS = ("Normal", "Tumor")


# --- the split of whole datasets: labels without any signal ---


def noise(patient: int, index: int) -> np.ndarray:
    """A picture unlike any other, int16 [40, 40]: near-duplicates would hide that patients are divided."""
    return np.random.default_rng(100 * patient + index).integers(-200, 200, (40, 40)).astype(np.int16)


def folder_of(patient: int, index: int) -> str:
    """Both labels for each patient: half of the slices each, by lot."""
    return LABELS[int(np.random.default_rng(7 * patient + index).integers(2))]


def dataset(tmp_path, kind, patients: int = 40, slices: int = 8) -> tuple[DatasetReport, list[int]]:
    """The report, and the true patient of each of its scans."""
    truth, files = {}, {}
    for patient in range(patients):
        for index in range(slices):
            below, content = kind(patient, index, noise(patient, index))
            name = f"{folder_of(patient, index)}/{below}"
            files[name], truth[name] = content, patient
    assert len(files) == patients * slices
    report = check_dataset(write_folder(files, tmp_path))
    return report, [truth[scan.path] for scan in report.scans]


def divided(truth: list[int], split: Split) -> set[int]:
    """Patients with scans on two sides."""
    train, validation, test = ({truth[index] for index in side} for side in (split.train, split.validation, split.test))
    return train & validation | train & test | validation & test


@pytest.mark.parametrize("kind", KINDS)
def test_no_split_divides_a_patient_and_no_leak_is_counted(tmp_path, kind):
    report, truth = dataset(tmp_path, kind)
    assert report.problems == ()
    splits = [split_scans(report, seed) for seed in range(5)] + fold_splits(report, 0, 4)
    for split in splits:
        assert divided(truth, split) == set()
        assert leaks(report, split) == Leaks()
        assert min(len(side) for side in (split.train, split.validation, split.test)) > 0


def test_where_nothing_tells_the_patients_it_is_said(tmp_path):
    report, truth = dataset(tmp_path, unknown)
    assert {scan.patient for scan in report.scans} == {None}
    assert "Nothing tells the patients" in report.warnings[-1]
    assert divided(truth, split_scans(report, 0)), "this is what the warning is about"


def test_studies_without_patients_are_told_apart_from_known_patients(tmp_path):
    report, _ = dataset(tmp_path, anonymous_studies, 12)
    assert (report.inspection.with_patient, report.inspection.with_study) == (0, 96)
    assert "Nothing tells the patients" in report.warnings[-2]
    assert "For 96 of these scans the study is known" in report.warnings[-1]


def test_a_patient_id_of_the_whole_dataset_is_warned_of(tmp_path):
    report, _ = dataset(tmp_path, one_identity, 12)
    assert report.inspection.common_identity == 96
    assert any("PatientID is one value for many studies in 96 scans" in warning for warning in report.warnings)


def test_one_patient_is_not_split_by_its_study(tmp_path):
    def same_study(patient: int, index: int, values: np.ndarray) -> tuple[str, bytes]:
        return f"{patient}-{index}.dcm", make_dicom(values, PatientID="", StudyInstanceUID="1.2.3.4")

    report, _ = dataset(tmp_path, same_study, 5)
    with pytest.raises(BadDataset, match=r"too few studies \(1\)"):
        split_scans(report, 0)


# --- what is weighed ---


def weighed(*evidence: Evidence, labels: str = "", listed: dict[int, Listed] | None = None) -> Weighed:
    rows = [(listed or {}).get(index) for index in range(len(evidence))]
    return weigh(evidence, list(labels) or ["T"] * len(evidence), rows)


def patients(*evidence: Evidence, **options: object) -> list[int]:
    """A number for each scan, equal for equal patients, in the order of their first scans; 0 for unknown."""
    found = [one.patient for one in weighed(*evidence, **options).belongings]  # type: ignore[arg-type]
    order = list(dict.fromkeys(patient for patient in found if patient))
    return [order.index(patient) + 1 if patient else 0 for patient in found]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Rule 1: words and codes, in folders first.
        (("patient-0001_1.png", "patient-0001_2.png", "patient-0002_1.png"), [1, 1, 2]),
        (("pat_12/IM1.png", "pat_12/IM2.png", "pat_13/IM1.png"), [1, 1, 2]),
        (("volume-12_slice-45.png", "volume-12_slice-46.png", "volume-13_slice-45.png"), [1, 1, 2]),
        (("BraTS20_Training_012/t1.png", "BraTS20_Training_012_flair_3.png", "BraTS20_Training_013.png"), [1, 1, 2]),
        (("BraTS-GLI-00012-000_4.png", "BraTS-GLI-00012-001_4.png", "BraTS-GLI-00013-000_4.png"), [1, 1, 2]),
        (("Brats18_CBICA_AAB_1.png", "Brats18_CBICA_AAM_1.png", "BraTS2021_00012_5.png"), [1, 2, 3]),
        (("LIDC-IDRI-0012/1-01.png", "LIDC-IDRI-0012/1-02.png", "LIDC-IDRI-0013/1-01.png"), [1, 1, 2]),
        (("case_00012/1.png", "case_00012_2.png", "case_00013.png"), [1, 1, 2]),
        (("sub-01/ses-1/anat/a_1.png", "sub-01/ses-2/anat/a_2.png", "sub-02/ses-1/anat/a_1.png"), [1, 1, 2]),
        (("941_S_1234_1.png", "941_S_1234_2.png", "941_S_1235_1.png"), [1, 1, 2]),
        (("batch_1/patient-7_1.png", "batch_2/patient-7_2.png", "batch_2/patient-8.png"), [1, 1, 2]),
        (("hospitalA/patient-7_1.png", "hospitalB/patient-7_2.png", "hospitalB/patient-8.png"), [1, 1, 2]),
        # Rule 2: folders.
        (("1002/IM0001", "1002/IM0002", "1003/IM0001"), [1, 1, 2]),
        (("1002/T1/IM1.png", "1002/T2/IM1.png", "1003/T1/IM1.png"), [1, 1, 2]),
        (("axial/1002/1.png", "coronal/1002/1.png", "coronal/1003/1.png"), [1, 1, 2]),
        (("export/1002/1.png", "export/1002/2.png", "export/1003/1.png"), [1, 1, 2]),
        (("kidney export/1002/1.png", "kidney export/1002/2.png", "kidney export/1003/1.png"), [1, 1, 2]),
        (("P1/IM_p1.png", "P1/IM_p2.png", "P2/IM_p1.png"), [1, 1, 2]),
        (("07/P001.png", "07/P002.png", "08/P001.png"), [1, 1, 2]),
        (("1002/s0001.png", "1002/s0002.png", "1003/s0001.png"), [1, 1, 2]),
        (("Meier/1.png", "Meier/2.png", "Schulz/1", "Wu/1", "Klein/1", "Sala/1"), [1, 1, 2, 3, 4, 5]),
        (("T1/1.png", "T1/2.png", "T2/1.png", "T3/1.png"), [1, 1, 2, 3]),
        ((*(f"batch_{i}/1.png" for i in range(10)), "batch_0/2.png"), [*range(1, 11), 1]),
        # Rule 3: short ones.
        (("P0012_1.png", "P0012_2.png", "P0013_1.png"), [1, 1, 2]),
        (("s0012_1.png", "s0012_2.png", "s0013_1.png"), [1, 1, 2]),
        # None of them.
        (("p1.png", "p2.png", "p12.png"), [0, 0, 0]),
        (("IM_p1.png", "IM_p2.png", "IM_p3.png"), [0, 0, 0]),
        (("IM_sub1.png", "IM_sub2.png", "x sub-3.png"), [0, 0, 0]),
        (("scan_p001.png", "scan_p002.png", "x_s0001.png"), [0, 0, 0]),
        (("s1.png", "s12.png", "s123.png"), [0, 0, 0]),
        (("images/1.png", "images/2.png", "images/3.png"), [0, 0, 0]),
        (("T1/1.png", "T2/1.png", "flair/1.png"), [0, 0, 0]),
        (("kidneys/1.png", "kidneys/2.png", "kidneys/3.png"), [0, 0, 0]),
        (("left/1.png", "right/1.png", "batch 2/3.png"), [0, 0, 0]),
        (("papillary/1.png", "clear cell/1.png", "chromophobe/1.png"), [0, 0, 0]),
        (tuple(f"batch_{i}/1.png" for i in range(9)), [0] * 9),
        (("grade 1/1.png", "grade 2/1.png", "grade 3/1.png"), [0, 0, 0]),
    ],
)
def test_patients_by_names_alone(names, expected):
    assert patients(*map(Evidence, names)) == expected


def test_a_word_that_counts_slices_in_folders_with_numbers_joins_them_all():
    names = ("1002/case_1.png", "1002/case_2.png", "1003/case_1.png", "1003/case_2.png")
    links = [set(one.links) for one in weighed(*map(Evidence, names)).belongings]
    assert links[0] == links[1] != links[2] == links[3]
    assert all(links), "so that neither the folders' nor the words' patients are divided"


def dicom(identity: str | None = None, name: str = "x.dcm", **uids: str) -> Evidence:
    return replace(Evidence(name, identity), **uids)


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        # PatientID first.
        ([dicom("A", "patient-1.dcm"), dicom("B", "patient-1.dcm"), dicom("A", "patient-2.dcm")], [1, 2, 1]),
        ([dicom("A", "IM_p1.dcm"), dicom("A", "IM_p2.dcm"), dicom("B", "IM_p1.dcm")], [1, 1, 2]),
        # Its issuer.
        ([dicom("1", issuer="UKE"), dicom("1", issuer="UKSH"), dicom("1", issuer="UKE")], [1, 2, 1]),
        ([dicom("1", issuer="UKE"), dicom("1", issuer="UKSH"), dicom("1")], [1, 1, 1]),
        ([dicom("1", issuer="UKE"), dicom("1"), dicom("2")], [1, 1, 2]),
        # Names where DICOM says nothing.
        ([dicom(None, "patient-1_1.dcm"), dicom(None, "patient-1_2.dcm"), dicom("2")], [1, 1, 2]),
        # A name never divides what DICOM joins, and may join what DICOM leaves open.
        ([dicom(None, "case_1.dcm", study="1.2.3"), dicom(None, "case_2.dcm", study="1.2.3")], [0, 0]),
        ([dicom(None, "case_1.dcm", study="1.2.3"), dicom(None, "case_1.dcm", study="1.2.4")], [1, 1]),
        ([dicom(None, "p/case_1.dcm", series="1.2.3"), dicom(None, "p/x.dcm", series="1.2.3")], [0, 0]),
    ],
)
def test_patients_by_dicom_and_names(evidence, expected):
    assert patients(*evidence) == expected


def joined(*evidence: Evidence) -> bool:
    """Whether two scans have anything in common."""
    first, second = (
        {one.patient, one.study, *one.links} - {None} for one in weighed(*evidence, labels="TT").belongings
    )
    return bool(first & second)


@pytest.mark.parametrize("kind", ["study", "series", "frame"])
def test_scans_of_one_study_series_or_space_are_joined(kind):
    assert joined(dicom(None, **{kind: "1.2.3"}), dicom(None, **{kind: "1.2.3"}))
    assert joined(dicom("A", **{kind: "1.2.3"}), dicom(None, **{kind: "1.2.3"}))
    assert not joined(dicom(None, **{kind: "1.2.3"}), dicom(None, **{kind: "1.2.4"}))
    found = weighed(dicom("A", **{kind: "1.2.3"}), dicom("B", **{kind: "1.2.3"}), labels="TT")
    assert found.shared_uids == 2
    assert not joined(dicom("A", **{kind: "1.2.3"}), dicom("B", **{kind: "1.2.3"}))


@pytest.mark.parametrize(("patients_of_study", "is_joined"), [(2, True), (5, True), (6, False), (10, False)])
def test_a_uid_joins_patient_ids_unless_most_of_them_share_it(patients_of_study, is_joined):
    """A PatientID for each file is as wrong as one UID in all files; which of the two it is, the numbers tell."""
    scans = [dicom(f"P{i}", study="1.2.99" if i < patients_of_study else f"1.2.{i}") for i in range(10)]
    found = weighed(*scans)
    first, second = (one.study for one in found.belongings[:2])
    assert (first == second is not None) == is_joined
    assert (found.joined_identities, found.shared_uids) == (
        (patients_of_study, 0) if is_joined else (0, patients_of_study)
    )


def test_one_uid_of_several_kinds_joins_nothing():
    assert not joined(dicom(None, study="1.2.3"), dicom(None, series="1.2.3"))


def test_names_and_patient_ids_that_disagree_are_counted():
    agreeing = [dicom("A", "patient-1_1.dcm"), dicom("A", "patient-1_2.dcm"), dicom("B", "patient-2_1.dcm")]
    assert weighed(*agreeing).disagreeing == 0
    assert weighed(*agreeing, dicom("C", "patient-1_3.dcm")).disagreeing == 3
    assert weighed(*agreeing, dicom("B", "patient-3_1.dcm")).disagreeing == 2
    assert weighed(dicom("A", "patient-1.dcm"), dicom("A", "case_7.dcm")).disagreeing == 2
    assert weighed(dicom("A", "1.dcm"), dicom("B", "1.dcm"), dicom("A", "IM_p1.dcm")).disagreeing == 0


def test_patients_csv_overrules_everything():
    scans = [dicom("A", "patient-1.dcm", study="1.2.3"), dicom("A", "patient-1.dcm", study="1.2.3")]
    found = weighed(*scans, listed={0: Listed("x"), 1: Listed("y", study="s")}).belongings
    assert (found[0].study, found[0].links) == (None, ())
    assert found[1].study
    assert patients(*scans, listed={0: Listed("x"), 1: Listed("y")}) == [1, 2]
    assert patients(dicom("A"), dicom("B"), listed={0: Listed("x"), 1: Listed("x")}) == [1, 1]
    assert patients(dicom("A"), dicom("B"), listed={1: Listed("A")}) == [1, 1]


@pytest.mark.parametrize(
    ("studies", "common"), [((5,), True), ((4,), False), ((5, 5), True), ((5, 4), False), ((5, 5, 5), False)]
)
def test_a_patient_id_of_a_dataset_or_a_class_with_many_studies_is_a_placeholder(studies, common):
    scans = [
        dicom(f"P{number}", study=f"1.2.{number}.{study}")
        for number, some in enumerate(studies)
        for study in range(some)
    ]
    labels = ["N", *["T"] * (len(scans) - 1)]
    found = weigh(scans, labels, [None] * len(scans))
    assert found.common_identity == (len(scans) if common else 0)
    assert (found.belongings[0].patient is None) == common


# --- patients.csv ---


def listed_dataset(tmp_path, text: str | bytes, more: dict[str, bytes] | None = None, at: str = "patients.csv"):
    content = text.encode() if isinstance(text, str) else text
    return check_dataset(write_folder({**make_files(6), **(more or {}), at: content}, tmp_path))


def table(columns: str = "path,patient", *rows: str) -> str:
    return "\n".join([columns, *rows]) + "\n"


ALL = [f"{label}/{label}-{index:03}.png,{label[0]}{index // 2}" for label in LABELS for index in range(6)]


def test_patients_csv_tells_the_patients(tmp_path):
    report = listed_dataset(tmp_path, table("path,patient", *ALL))
    assert report.problems == ()
    assert (report.images, report.inspection.patients, report.inspection.ignored_files) == (12, 6, 1)
    assert report.inspection.patient_sources == {"patients.csv": 12}
    assert Counter(Counter(scan.patient for scan in report.scans).values()) == {2: 6}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_separators_and_byte_order_marks_of_spreadsheets_are_taken(tmp_path, separator, start):
    text = table("Path,PATIENT", *ALL, ",,", "").replace(",", separator).replace("\n", "\r\n")
    report = listed_dataset(tmp_path, start + text.encode())
    assert (report.problems, report.inspection.patients) == ((), 6)


def test_paths_are_relative_to_the_list_or_to_the_top_and_in_either_unicode_form(tmp_path):
    files = {f"kidney/{name}": content for name, content in make_files(6, ("Läsion", "Normal")).items()}
    rows = ["La\u0308sion/La\u0308sion-000.png,a", "kidney\\Läsion\\Läsion-001.png,a", "./Normal/Normal-000.png,b"]
    files["kidney/patients.csv"] = table("path,patient", *rows).encode()
    report = check_dataset(write_folder(files, tmp_path))
    assert (report.problems, report.inspection.patients, report.inspection.with_patient) == ((), 2, 3)
    assert any("patients.csv does not list: 9." in warning for warning in report.warnings)


def test_a_folder_with_names_in_the_other_unicode_form_is_found_too(tmp_path):
    files = make_files(6, ("La\u0308sion", "Normal"))
    report = check_dataset(
        write_folder({**files, "patients.csv": "path,patient\nLäsion/Läsion-000.png,a".encode()}, tmp_path)
    )
    assert (report.problems, report.inspection.with_patient) == ((), 1)


def test_labels_and_splits_come_from_the_list_too(tmp_path):
    sides = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    rows = [f"all/{i}.png,p{i},s{i},{LABELS[i % 2]},{side}" for i, side in enumerate(sides)]
    files = {f"all/{i}.png": encode(make_pixels(i)) for i in range(12)}
    files["patients.csv"] = table("path,patient,study,label,split", *rows).encode()
    report = check_dataset(write_folder(files, tmp_path))
    assert (report.problems, report.classes) == ((), {"Normal": 6, "Tumor": 6})
    assert Counter(scan.side for scan in report.scans) == {"train": 6, "test": 4, "validation": 2}
    assert all(scan.study for scan in report.scans)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("Normal/Normal-000.png,", "row 2: patient is empty."),
        (",p1", "row 2: path is empty."),
        ("Normal/nothing.png,p1", "row 2: there is no scan 'Normal/nothing.png'."),
        ("../Normal/Normal-000.png,p1", "row 2: there is no scan '../Normal/Normal-000.png'."),
        ("Normal/Normal-000.png,p1,,,tomorrow", "row 2: split must be train, validation or test, not 'tomorrow'."),
        ("Normal/Normal-000.png,p1\nNormal/Normal-000.png,p2", "row 3: the scan has a row already."),
        ("Normal/Normal-000.png", "row 2: patient is empty."),
    ],
)
def test_bad_rows_are_problems_that_name_the_row(tmp_path, row, why):
    report = listed_dataset(tmp_path, table("path,patient,study,label,split", row))
    assert report.problems == (f"patients.csv, {why}",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"file,patient\na,b\n", "its first row lacks path"),
        (b"", "its first row lacks path and patient"),
        ("path,patient\nNormal/ä.png,ä\n".encode("latin-1"), "it is not UTF-8"),
        (b'path,patient\n"' + b"x" * 200_000 + b'",a\n', "row 2 cannot be read as CSV"),
    ],
)
def test_a_list_that_cannot_be_read_is_a_problem(tmp_path, content, why):
    problems = listed_dataset(tmp_path, content).problems
    assert [why in problem for problem in problems] == [True]


def test_very_many_bad_rows_are_counted(tmp_path):
    report = listed_dataset(tmp_path, table("path,patient", *(f"x{i}.png,a" for i in range(30))))
    assert len(report.problems) == 21
    assert report.problems[-1] == "patients.csv: 10 more rows are wrong."


def test_two_lists_are_a_problem(tmp_path):
    report = listed_dataset(tmp_path, table(), {"Tumor/patients.csv": b"x"}, at="Normal/patients.csv")
    assert "two lists of patients" in report.problems[0]
