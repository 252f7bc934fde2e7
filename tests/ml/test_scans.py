"""The check of a dataset: contents, problems and patients, and its manifest."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ml.image.dataset.patients import patient_of
from ml.image.dataset.scans import check_dataset, load_manifest, save_manifest
from ml.runtime.errors import BadDataset
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


def test_a_readme_is_no_scan(tmp_path):
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


def test_on_picture_gets_every_scan_with_its_index(tmp_path):
    seen = {}
    report = check_dataset(
        write_folder(make_files(6), tmp_path), on_picture=lambda index, picture: seen.update({index: picture.pixels})
    )
    assert list(seen) == list(range(12))
    assert np.array_equal(seen[7], make_pixels(1001, bright=True))
    assert report.scans[7].path == "Tumor/Tumor-001.png"


def test_a_manifest_comes_back_as_it_was(tmp_path):
    report = check_dataset(write_folder(make_files(6), tmp_path / "data"))
    save_manifest(report, tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == report


def patient_in(tmp_path, name: str) -> str | None:
    """The patient of a file with this name."""
    report = check_dataset(write_folder({**make_files(6), name: encode(make_pixels(5))}, tmp_path))
    return next(scan.patient for scan in report.scans if scan.path == name)


@pytest.mark.parametrize(
    "name",
    [
        "patient-0012_slice-03.png",
        "patient_12.png",
        "Patient 12.png",
        "patientID_12.png",
        "P012_4.png",
        "P0012.png",
        "pat-0003.png",
        "pat 7/slice.png",
        "case_12.png",
        "subject-12/1.png",
        "sub-01/anat/sub-01_T1w.png",
        "TCGA-B0-5694/slice-3.png",
        "tcga-b0-5694-01a_4.png",
        "C3L-00004_4.png",
    ],
)
def test_patient_ids_are_read_from_names(tmp_path, name):
    assert patient_in(tmp_path, f"Tumor/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "Tumor-012.png",
        "Tumor- (12).jpg",
        "image(12).png",
        "patient (12).png",
        "clip12.png",
        "map12.png",
        "1080p.png",
        "lowercase12.png",
        "showcase_12.png",
        "crop_12.png",
        "12/slice-3.png",
        "TCGA-export.png",
    ],
)
def test_numbers_and_words_are_no_patient_ids(tmp_path, name):
    assert patient_in(tmp_path, f"Tumor/{name}") is None


def test_one_patient_under_several_names_is_one(tmp_path):
    names = ["Tumor/patient-12_slice-1.png", "Tumor/Patient 12.png", "Normal/pat_12/slice-3.png"]
    files = {name: encode(make_pixels(number)) for number, name in enumerate(names)}
    report = check_dataset(write_folder({**make_files(6), **files}, tmp_path))
    assert len({scan.patient for scan in report.scans if scan.path in names}) == 1


def test_a_case_and_a_patient_of_one_number_are_two():
    assert patient_of("case-12.png", None) != patient_of("patient-12.png", None)


def test_folders_above_the_class_are_no_patient_ids(tmp_path):
    files = {f"patient-1 export/{name}": content for name, content in make_files(6).items()}
    report = check_dataset(write_folder({**files, "patient-1 export/p2/3.png": encode(make_pixels(9))}, tmp_path))
    assert {scan.patient for scan in report.scans} == {None}


@pytest.mark.parametrize(
    "identity",
    [
        *(
            "",
            " ",
            "0",
            "000",
            "ANONYMOUS",
            "Anonymized",
            "unknown",
            "n/a",
            "XXX",
            "-",
            "Anonymous^^",
            "None",
            "12345678",
        ),
        *("PATIENT", "PatientID", "anonymous patient", "DEIDENTIFIED", "No Name", "\0\0"),
    ],
)
def test_placeholders_are_no_patient_ids(identity):
    assert patient_of("scan.dcm", identity) is None


@pytest.mark.parametrize("identity", ["ANON001", "1", "12345", "X1", "patient 7", "Nonet", "TESTA-12"])
def test_pseudonyms_are_patient_ids(identity):
    assert patient_of("scan.dcm", identity)


def test_the_patient_is_read_from_dicom_and_hashed_in_the_manifest(tmp_path):
    files = {**make_files(6), "Normal/scan.dcm": make_dicom(np.zeros((8, 8), np.int16))}
    report = check_dataset(write_folder(files, tmp_path / "data"))
    scan = next(scan for scan in report.scans if scan.path.endswith(".dcm"))
    assert scan.patient
    save_manifest(report, tmp_path / "manifest.json")
    assert "SECRET" not in (tmp_path / "manifest.json").read_text()


def test_a_window_is_passed_on_to_every_scan(tmp_path):
    folder = write_folder({**make_files(6), "Normal/ct.dcm": make_dicom(np.full((8, 8), 300, np.int16))}, tmp_path)
    seen: list[int] = []
    for window in (None, (300.0, 1000.0)):
        check_dataset(
            folder,
            window=window,
            on_picture=lambda index, picture: seen.append(int(picture.pixels.max())) if index == 6 else None,
        )
    assert seen == [255, 128]


def test_a_manifest_of_before_the_inspection_is_still_read(tmp_path):
    report = check_dataset(write_folder(make_files(6), tmp_path / "data"))
    save_manifest(report, tmp_path / "manifest.json")
    fields = json.loads((tmp_path / "manifest.json").read_text())
    for new in ("warnings", "inspection"):
        del fields[new]
    fields["scans"] = [
        {name: scan[name] for name in ("path", "label", "sha256", "patient")} for scan in fields["scans"]
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    old = load_manifest(tmp_path / "manifest.json")
    assert (old.classes, old.digest, old.warnings) == (report.classes, report.digest, ())
    assert {scan.perceptual_hash for scan in old.scans} == {None}


@pytest.mark.parametrize(
    "content",
    ['{"scans": []}', '{"scans": [{"colour": 1}]}', "[]", '{"scans": [], "classes": {}, "inspection": {"moons": 1}}'],
)
def test_a_manifest_of_another_version_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BadDataset, match="run the stage data_ingestion again"):
        load_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", [None, "", '{"scans": ['])
def test_a_missing_or_damaged_manifest_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BadDataset, match="no dataset yet"):
        load_manifest(tmp_path / "manifest.json")
