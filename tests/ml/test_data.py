"""What a dataset holds, what is wrong with it, and how it is split."""

from __future__ import annotations

import numpy as np
import pytest

from ml.data import DatasetReport, ScanFile, check_dataset, load_manifest, save_manifest, split_scans
from ml.errors import BadDataset
from tests.ml.builders import encode, make_dicom, make_files, make_pixels, write_folder


def test_class_folders_are_counted(tmp_path):
    report = check_dataset(write_folder(make_files(6), tmp_path))
    assert report.classes == {"Normal": 6, "Tumor": 6}
    assert report.images == 12
    assert report.problems == ()


@pytest.mark.parametrize("wrapper", ["kidney-ct-scan-image", "outer/inner"])
def test_class_folders_are_found_below_wrapper_folders(tmp_path, wrapper):
    write_folder({f"{wrapper}/{name}": content for name, content in make_files(6).items()}, tmp_path)
    report = check_dataset(tmp_path)
    assert report.classes == {"Normal": 6, "Tumor": 6}
    assert report.scans[0].path == f"{wrapper}/Normal/Normal-000.png"


def test_scans_may_lie_in_a_folder_for_each_patient(tmp_path):
    files = {name.replace("/", f"/patient-{i:03}/"): content for i, (name, content) in enumerate(make_files(6).items())}
    report = check_dataset(write_folder(files, tmp_path))
    assert report.classes == {"Normal": 6, "Tumor": 6}
    assert len({scan.patient for scan in report.scans}) == 12


def test_a_readme_is_nobodys_scan(tmp_path):
    files = {**make_files(6), "README.txt": b"x", "Normal/labels.csv": b"x"}
    assert check_dataset(write_folder(files, tmp_path)).images == 12


def test_one_class_only_is_a_problem(tmp_path):
    report = check_dataset(write_folder(make_files(6, classes=("Normal",)), tmp_path))
    assert "one class only (Normal)" in report.problems[0]


def test_one_class_below_a_wrapper_is_one_class_not_its_files(tmp_path):
    files = {f"data/{name}": content for name, content in make_files(6, classes=("Normal",)).items()}
    assert check_dataset(write_folder(files, tmp_path)).classes == {"Normal": 6}


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"x"}, {"Normal/notes.txt": b"x"}])
def test_nothing_in_it_is_a_problem(tmp_path, files):
    report = check_dataset(write_folder(files, tmp_path))
    assert report.problems == (
        "The dataset holds no images: one folder for each class is expected, with its scans in it.",
    )


def test_broken_images_are_named(tmp_path):
    files = {**make_files(6), "Normal/torn.png": encode(make_pixels())[:200], "Tumor/page.jpg": b"<html>"}
    problems = check_dataset(write_folder(files, tmp_path)).problems
    assert [problem.split(":")[0] for problem in problems] == ["Normal/torn.png", "Tumor/page.jpg"]


def test_very_many_broken_images_are_counted(tmp_path):
    files = {**make_files(6), **{f"Normal/broken-{i}.png": b"x" for i in range(30)}}
    assert check_dataset(write_folder(files, tmp_path)).problems[-1] == "10 more files cannot be read."


def test_too_few_scans_of_a_class_are_a_problem(tmp_path):
    files = make_files(6)
    for index in range(3, 6):
        del files[f"Tumor/Tumor-{index:03}.png"]
    assert check_dataset(write_folder(files, tmp_path)).problems == ("Class Tumor has 3 scans: at least 5 are needed.",)


def test_another_number_of_classes_than_asked_for_is_a_problem(tmp_path):
    assert "classes is 4" in check_dataset(write_folder(make_files(6), tmp_path), classes=4).problems[0]


def test_the_digest_is_of_contents_and_labels_not_of_names(tmp_path):
    files = make_files(6)
    renamed = {f"wrapper/{name.replace('-', '_')}": content for name, content in files.items()}
    swapped = dict(zip(files, reversed(files.values()), strict=True))
    digests = [
        check_dataset(write_folder(some, tmp_path / str(number))).digest
        for number, some in enumerate((files, renamed, swapped))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_sink_gets_every_scan_at_its_place(tmp_path):
    seen = {}
    report = check_dataset(
        write_folder(make_files(6), tmp_path), sink=lambda index, pixels: seen.update({index: pixels})
    )
    assert list(seen) == list(range(12))
    assert np.array_equal(seen[7], make_pixels(1001, bright=True))
    assert report.scans[7].path == "Tumor/Tumor-001.png"


def test_a_manifest_comes_back_as_it_was(tmp_path):
    report = check_dataset(write_folder(make_files(6), tmp_path / "data"))
    save_manifest(report, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == report


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Tumor/patient-0012_slice-03.png", True),
        ("Tumor/P012_4.png", True),
        ("Tumor/pat 7/slice.png", True),
        ("Tumor/Tumor-012.png", False),
        ("Tumor/clip12.png", False),
    ],
)
def test_names_tell_the_patient(tmp_path, name, told):
    report = check_dataset(write_folder({**make_files(6), name: encode(make_pixels(5))}, tmp_path))
    scan = next(scan for scan in report.scans if scan.path == name)
    assert (scan.patient is not None) == told


def test_a_dicom_header_tells_the_patient_and_the_manifest_does_not(tmp_path):
    files = {**make_files(6), "Normal/scan.dcm": make_dicom(np.zeros((8, 8), np.int16))}
    report = check_dataset(write_folder(files, tmp_path / "data"))
    scan = next(scan for scan in report.scans if scan.path.endswith(".dcm"))
    assert scan.patient
    save_manifest(report, tmp_path / "manifest.json")
    assert "SECRET" not in (tmp_path / "manifest.json").read_text()


def make_report(patients: int, slices: int = 5, tumour_share: float = 0.5) -> DatasetReport:
    scans = []
    for patient in range(patients):
        label = "Tumor" if patient < tumour_share * patients else "Normal"
        scans += [ScanFile(f"{label}/{patient}-{i}.png", label, f"{patient}-{i}", str(patient)) for i in range(slices)]
    scans.sort(key=lambda scan: scan.label)
    counts = {name: sum(scan.label == name for scan in scans) for name in ("Normal", "Tumor")}
    return DatasetReport(counts, len(scans), "digest", (), tuple(scans))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("patients", "held_out"), [(96, 0.2), (10, 0.2), (4, 0.2), (40, 0.3), (40, 0.5), (40, 0.05)])
def test_a_split_never_shares_a_patient_and_has_every_class_on_both_sides(patients, held_out, seed):
    report = make_report(patients)
    split = split_scans(report, seed, held_out)
    sides = [{report.scans[index].patient for index in side} for side in (split.train, split.held_out)]
    assert not sides[0] & sides[1]
    assert sorted([*split.train, *split.held_out]) == list(range(report.images))
    assert {report.scans[index].label for index in split.held_out} == {"Normal", "Tumor"}
    if patients >= 40:
        assert len(split.held_out) / report.images == pytest.approx(held_out, abs=0.06)


def test_copies_of_one_picture_stay_on_one_side():
    scans = tuple(
        ScanFile(f"{label}/{i}.png", label, f"{label}-{i // 2}", None)
        for label in ("Normal", "Tumor")
        for i in range(40)
    )
    split = split_scans(DatasetReport({"Normal": 40, "Tumor": 40}, 80, "", (), scans), seed=1)
    assert not {scans[i].sha256 for i in split.train} & {scans[i].sha256 for i in split.held_out}


def test_without_patients_the_split_is_stratified_to_the_scan():
    scans = tuple(ScanFile(f"{i}", "Normal" if i < 240 else "Tumor", str(i), None) for i in range(465))
    report = DatasetReport({"Normal": 240, "Tumor": 225}, 465, "", (), scans)
    split = split_scans(report, seed=0)
    assert len(split.held_out) == 93
    assert (report.labels[split.held_out] == 1).sum() == 45


def test_the_seed_decides_the_split():
    report = make_report(40)
    assert np.array_equal(split_scans(report, 3).held_out, split_scans(report, 3).held_out)
    assert not np.array_equal(split_scans(report, 3).held_out, split_scans(report, 4).held_out)


def test_two_patients_are_too_few():
    with pytest.raises(BadDataset, match="patients are too few"):
        split_scans(make_report(2), seed=0)
