"""What is a scan, what is a class, what is a side of a split, and what is passed over."""

from __future__ import annotations

import io
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from ml.evaluation.intervals import wilson
from ml.image.dataset.lineage import leaks
from ml.image.dataset.scans import DatasetReport, check_dataset, load_manifest, save_manifest
from ml.image.dataset.splits import split_by_folders, split_scans
from ml.image.pipeline import ImagePipeline
from ml.image.stages.run import Run
from ml.runtime.archives import extract_zip
from ml.runtime.config import PipelineConfig, parse_params
from ml.runtime.errors import BadDataset, BadParams
from tests.field import FIELD, ZIPS
from tests.ml.builders import encode, make_dicom, make_files, make_pixels, write_folder, write_zip


def checked(tmp_path, files: dict[str, bytes]) -> DatasetReport:
    return check_dataset(write_folder(files, tmp_path))


def moved(files: dict[str, bytes], **places: str) -> dict[str, bytes]:
    """The files with the starts of their names replaced."""
    return {
        next((new + name[len(old) :] for old, new in places.items() if name.startswith(old)), name): content
        for name, content in files.items()
    }


# --- what is a scan ---


def bare_dicom() -> bytes:
    """Without preamble and meta header: the data set begins with group 0008."""
    from pydicom import dcmread

    dataset = dcmread(io.BytesIO(make_dicom(np.eye(40, dtype=np.int16) * 900)))
    sink = io.BytesIO()
    dataset.preamble = None
    del dataset.file_meta
    dataset.save_as(sink, enforce_file_format=False, little_endian=True, implicit_vr=False)
    assert sink.getvalue()[:2] == b"\x08\0"
    return sink.getvalue()


PICTURE = Image.fromarray(make_pixels(77))
SCANS = {
    "IM0001": make_dicom(np.eye(40, dtype=np.int16) * 900),
    "1.2.826.0.1.3680043.8.498.3000": make_dicom(np.eye(40, dtype=np.int16) * 800),
    "bare": bare_dicom(),
    "scan.txt": encode(PICTURE, "PNG"),
    "scan.jfif": encode(PICTURE, "JPEG"),
    "scan": encode(PICTURE, "TIFF"),
    "scan.bin": encode(PICTURE, "BMP"),
    "scan.csv": encode(PICTURE, "WEBP", lossless=True),
    "scan.dcm": encode(PICTURE, "PNG"),
}


@pytest.mark.parametrize("name", SCANS)
def test_content_makes_a_scan_whatever_its_name(tmp_path, name):
    report = checked(tmp_path, {**make_files(6), f"Tumor/{name}": SCANS[name]})
    assert (report.classes, report.problems) == ({"Normal": 6, "Tumor": 7}, ())
    assert report.scans[-1].height > 0 or report.scans[6].height > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("notes.txt", b"x"), ("labels.csv", b"a,b"), ("weights", b"\0" * 400), ("mask.json", b"{}"), ("empty", b"")),
        ("text", b"BM is no bitmap, but a text that begins like one, and goes on for a while"),
    ],
)
def test_other_content_makes_none(tmp_path, name, content):
    report = checked(tmp_path, {**make_files(6), f"Tumor/{name}": content})
    assert (report.images, report.problems, report.inspection.ignored_files) == (12, (), 1)
    assert any("Files that are no pictures are passed over: 1." in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.jpg", b"<html>not found</html>"),
        ("empty.dcm", b""),
        ("torn", encode(make_pixels())[:200]),
        ("film.gif", encode(PICTURE, "GIF")),
        ("volume.nii", bytes(344) + b"n+1\0" + bytes(100)),
        ("scan.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)),
    ],
)
def test_what_is_or_says_to_be_a_scan_and_cannot_be_read_is_a_problem_that_names_it(tmp_path, name, content):
    report = checked(tmp_path, {**make_files(6), f"Tumor/{name}": content})
    assert [problem.split(":")[0] for problem in report.problems] == [f"Tumor/{name}"]


def test_the_manifest_keeps_where_a_scan_comes_from(tmp_path):
    scan = make_dicom(np.eye(40, dtype=np.int16) * 900, BodyPartExamined="KIDNEY")
    report = checked(tmp_path / "scans", {**make_files(6), "Tumor/z.dcm": scan})
    save_manifest(report, tmp_path / "manifest.json")
    last = load_manifest(tmp_path / "manifest.json").scans[-1]
    assert (last.modality, last.body_part, last.kind) == ("CT", "KIDNEY", "grey")
    assert (report.scans[0].modality, report.scans[0].body_part, report.scans[0].kind) == (None, None, "colour")


# --- what is passed over ---


@pytest.mark.parametrize(
    ("name", "is_picture"),
    [
        ("Tumor/.ipynb_checkpoints/a-checkpoint.png", True),
        ("Tumor/a/b/.ipynb_checkpoints/a.png", True),
        ("Tumor/._a.png", True),
        ("__MACOSX/Tumor/a.png", True),
        ("kidney/@eaDir/a.png", True),
        (".Trash-1000/files/a.png", True),
        ("Tumor/Thumbs.db", False),
        ("DICOMDIR", False),
        ("Tumor/LICENSE", False),
        ("VERSION", False),
    ],
)
def test_what_is_passed_over_is_counted_and_named_if_it_is_a_picture(tmp_path, name, is_picture):
    content = encode(make_pixels(99)) if is_picture else b"some text"
    report = checked(tmp_path, {**make_files(6), name: content})
    assert (report.classes, report.problems) == ({"Normal": 6, "Tumor": 6}, ())
    assert (report.inspection.junk_files, report.inspection.junk_pictures) == (1, int(is_picture))
    assert any("put beside scans, are passed over: 1" in warning for warning in report.warnings)
    assert report.passed_over == ((name,) if is_picture else ())
    assert not any(name in warning for warning in report.warnings)


def test_very_many_names_are_bounded(tmp_path):
    hidden = {f"Tumor/.cache/{i:03}.png": encode(make_pixels(i, 8, 8)) for i in range(30)}
    passed_over = checked(tmp_path, {**make_files(6), **hidden}).passed_over
    assert (len(passed_over), passed_over[-1]) == (21, "and 10 more")


def test_the_datasets_owner_reads_the_names_and_the_public_report_does_not(tmp_path):
    path = write_zip({**make_files(6), "Tumor/.cache/anna.png": encode(make_pixels(1))}, tmp_path / "data.zip")
    found = ImagePipeline().check(path, tmp_path / "out", lambda fraction: None)
    assert found.inspection["passed_over"] == ["Tumor/.cache/anna.png"]
    assert "anna" not in repr(asdict(check_dataset(tmp_path / "out").inspection))


def test_a_zip_that_cannot_be_unpacked_is_an_invalid_dataset_with_the_reason(tmp_path):
    path = write_zip({"Tumor": b"x", "Tumor/1.png": b"x"}, tmp_path / "data.zip")
    found = ImagePipeline().check(path, tmp_path / "out", lambda fraction: None)
    assert found.problems == ("'Tumor' is both a file and a folder in the zip. Rename one of them.",)


# --- what is a class ---


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ("tumor", "Tumor and tumor"),
        ("TUMOR", "TUMOR and Tumor"),
        ("Tumor ", "Tumor and Tumor "),
        ("Ｔumor", "Tumor and Ｔumor ('\\uff34umor')"),
    ],
)
def test_classes_that_differ_by_spelling_alone_are_a_problem_that_names_both(tmp_path, other, shown):
    files = {**make_files(6), **{f"{other}/{i}.png": encode(make_pixels(500 + i)) for i in range(6)}}
    problems = checked(tmp_path, files).problems
    assert f"The classes {shown} differ by case, spaces or Unicode form alone" in problems[0]


def test_a_class_has_one_name_whatever_the_disk_makes_of_it(tmp_path):
    report = checked(tmp_path, make_files(6, ("Normal", "La\u0308sion")))
    assert (report.classes, report.problems) == ({"Läsion": 6, "Normal": 6}, ())


def test_patients_at_the_top_are_no_classes(tmp_path):
    files = {f"patient-{i % 4}/{name}": content for i, (name, content) in enumerate(make_files(6).items())}
    assert "are named as patients, not as classes" in checked(tmp_path, files).problems[0]


def test_patients_with_classes_below_are_no_classes(tmp_path):
    files = {f"P{i // 4:02}/{('Normal', 'Tumor')[i % 2]}/{i}.png": encode(make_pixels(i)) for i in range(24)}
    assert "P00, P01, P02 and others are named as patients" in checked(tmp_path, files).problems[0]


@pytest.mark.parametrize("below", ["{i}/1.png", "axial/{i}.png", "{i}.png", "patient-{i}/1.png"])
def test_classes_may_be_numbers(tmp_path, below):
    files = {f"{i % 3}/{below.format(i=i)}": encode(make_pixels(i)) for i in range(24)}
    report = checked(tmp_path, files)
    assert (report.classes, report.problems) == ({"0": 8, "1": 8, "2": 8}, ())


def test_one_class_with_a_folder_for_each_patient_is_one_class(tmp_path):
    files = {f"Tumor/patient-{i}/1.png": encode(make_pixels(i)) for i in range(6)}
    assert checked(tmp_path, files).classes == {"Tumor": 6}


@pytest.mark.parametrize("beside", ["LICENSE", "README.md", "kidney/VERSION", "kidney/labels.csv", "docs/a.txt"])
def test_texts_beside_the_class_folders_are_no_class(tmp_path, beside):
    files = {f"kidney/{name}": content for name, content in make_files(6).items()}
    assert checked(tmp_path, {**files, beside: b"x"}).classes == {"Normal": 6, "Tumor": 6}


# --- sides of a split ---


def sided(train: int = 12, validation: int = 4, test: int = 4, names=("train", "val", "test"), around="kidney/"):
    """Sides with both classes, a patient for each scan."""
    files, number = {}, 0
    for side, count in zip(names, (train, validation, test), strict=True):
        for _ in range(count):
            for label in ("Normal", "Tumor"):
                files[f"{around}{side}/{label}/patient-{number:03}.png"] = encode(make_pixels(number))
                number += 1
    return files


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "TEST"),
        ("training_set", "dev", "test_set"),
        ("seg_train", "seg_val", "seg_test"),
        ("train images", "val_images", "test-data"),
    ],
)
@pytest.mark.parametrize("around", ["", "kidney/"])
def test_sides_are_pooled_with_a_warning(tmp_path, names, around):
    report = checked(tmp_path, sided(names=names, around=around))
    assert (report.classes, report.problems) == ({"Normal": 20, "Tumor": 20}, ())
    assert report.inspection.sides == {"train": 24, "validation": 8, "test": 8}
    assert any("sides of a split (train 24," in warning for warning in report.warnings)


def test_split_folders_keeps_the_sides(tmp_path):
    report = checked(tmp_path, sided())
    split = split_by_folders(report, 0)
    for name in ("train", "validation", "test"):
        assert {report.scans[index].side for index in getattr(split, name)} == {name}
    assert [len(side) for side in (split.train, split.validation, split.test)] == [24, 8, 8]
    assert split_scans(report, 0).test.tolist() != split.test.tolist()


def test_a_side_within_its_own_folder_and_sides_below_the_classes_are_sides_too(tmp_path):
    nested = {name.replace("train/", "train/train/"): content for name, content in sided().items()}
    below = {
        "/".join(["kidney", parts[2], parts[1], parts[3]]): content
        for name, content in sided().items()
        for parts in [name.split("/")]
    }
    for number, files in enumerate((nested, below)):
        report = checked(tmp_path / str(number), files)
        assert (report.classes, report.inspection.patients) == ({"Normal": 20, "Tumor": 20}, 40)
        assert len(split_by_folders(report, 0).test) == 8


def test_the_parameter_split_decides(tmp_path):
    report = checked(tmp_path / "scans", sided())
    config = PipelineConfig.below(tmp_path / "artifacts")
    config.data_ingestion.manifest_path.parent.mkdir(parents=True)
    save_manifest(report, config.data_ingestion.manifest_path)
    by_folders = Run(config, parse_params({"split": "folders"}), print).split
    by_patients = Run(config, parse_params({}), print).split
    assert by_folders.test.tolist() == split_by_folders(report, 0).test.tolist()
    assert by_patients.test.tolist() == split_scans(report, 0).test.tolist() != by_folders.test.tolist()


def test_without_a_validation_folder_it_is_drawn_from_train(tmp_path):
    report = checked(tmp_path, sided(16, 0, 4))
    split = split_by_folders(report, 0, 0.2)
    assert {report.scans[index].side for index in split.validation} == {"train"}
    assert len(split.test) == 8
    assert len(split.validation) == pytest.approx(6, abs=1)
    assert len(split_by_folders(report, 0, 0).validation) == 0


def test_a_patient_on_two_sides_is_kept_there_counted_and_warned_of(tmp_path):
    files = moved(sided(), **{"kidney/test/Normal/patient-032": "kidney/test/Normal/patient-000_again"})
    report = checked(tmp_path, files)
    assert report.inspection.groups_on_several_sides == 1
    assert any("lie on several of these sides: 1." in warning for warning in report.warnings)
    assert leaks(report, split_by_folders(report, 0)).patients == 1
    assert not leaks(report, split_scans(report, 0)).any


def test_split_folders_without_sides_or_classes_on_them_is_refused(tmp_path):
    with pytest.raises(BadDataset, match="12 scans lie in no folder of train"):
        split_by_folders(checked(tmp_path / "a", make_files(6)), 0)
    files = {name: content for name, content in sided().items() if "test/Tumor" not in name}
    with pytest.raises(BadDataset, match="leaves no Tumor to test on"):
        split_by_folders(checked(tmp_path / "b", files), 0)


def test_sides_without_class_folders_are_a_problem(tmp_path):
    files = {f"{side}/{i}.png": encode(make_pixels(i)) for i in range(6) for side in ("train", "test")}
    assert "test and train are sides of a split, not classes" in " ".join(checked(tmp_path, files).problems)


def test_a_test_folder_without_classes_is_passed_over_and_named(tmp_path):
    files = {name: content for name, content in sided(around="").items() if not name.startswith("test/")}
    report = checked(tmp_path, {**files, "test/1.png": encode(make_pixels(900))})
    assert (report.classes, report.passed_over) == ({"Normal": 16, "Tumor": 16}, ("test/1.png",))


def test_one_side_beside_the_classes_that_it_repeats_is_a_side(tmp_path):
    more = {f"test/{name}": content for name, content in make_files(3, side=40).items()}
    report = checked(tmp_path, {**make_files(6), **more})
    assert (report.classes, report.inspection.sides) == ({"Normal": 9, "Tumor": 9}, {"test": 6})


def test_a_class_may_be_named_test(tmp_path):
    report = checked(tmp_path, make_files(6, ("Control", "Test")))
    assert report.classes == {"Control": 6, "Test": 6}


def test_folds_draw_their_own_sides():
    with pytest.raises(BadParams, match="folds: cross-validation draws its own sides"):
        parse_params({"split": "folders", "folds": 3})


# --- thin and odd data ---


def test_the_interval_to_be_expected_is_wilsons_for_the_patients_of_a_fifth(tmp_path):
    files = {f"Normal/patient-{i // 2}_{i}.png": encode(make_pixels(i)) for i in range(40)}
    files |= {f"Tumor/patient-{50 + i // 2}_{i}.png": encode(make_pixels(100 + i)) for i in range(40)}
    found = checked(tmp_path, files)
    z, n, p = 1.959963984540054, 4, 0.9  # 20 patients a class, of which a fifth will test; Wilson 1927
    centre, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + side * reach) / (1 + z * z / n) for side in (-1, 1))
    assert found.inspection.groups == {"Normal": 20, "Tumor": 20}
    assert found.inspection.sensitivity["Tumor"] == pytest.approx((low, high), abs=6e-4)
    assert wilson(p, n) == pytest.approx((low, high))
    assert any(
        f"(1 more class is like it): a sensitivity of 0.9 would be known no better than from {low:.2f} to {high:.2f}. "
        "Add patients." in warning
        for warning in found.warnings
    )


def test_fewer_patients_than_sides_are_told_before_training(tmp_path):
    files = {f"Tumor/patient-{i % 2}_{i}.png": encode(make_pixels(i)) for i in range(6)}
    report = checked(
        tmp_path, {**files, **{f"Normal/patient-{9 + i}.png": encode(make_pixels(9 + i)) for i in range(6)}}
    )
    assert report.problems == ()
    assert any(
        "Class Tumor has 2 patients, copies aside: training refuses fewer than 3" in one for one in report.warnings
    )
    with pytest.raises(BadDataset, match=r"too few patients \(2\).*list them in patients.csv"):
        split_scans(report, 0)


@pytest.mark.parametrize(("of_one", "warned"), [(4, True), (3, False)])
def test_a_patient_with_a_third_of_a_class_is_warned_of(tmp_path, of_one, warned):
    files = {f"Tumor/patient-{0 if i < of_one else i}_{i}.png": encode(make_pixels(i)) for i in range(12)}
    report = checked(tmp_path, {**files, **{f"Normal/{i}.png": encode(make_pixels(100 + i)) for i in range(12)}})
    assert report.inspection.largest_share == {"Tumor": round(of_one / 12, 3)}
    assert any("One patient has 33%" in warning for warning in report.warnings) == warned


BLANK = [encode(np.full((40, 40, 3), 7 + number, np.uint8)) for number in range(8)]


@pytest.mark.parametrize(("blank", "refused"), [(3, False), (4, True)])
def test_more_than_a_fifth_of_blank_scans_is_a_problem(tmp_path, blank, refused):
    files = {**make_files(6), **{f"Tumor/blank-{i}.png": BLANK[i] for i in range(blank)}}
    problems = checked(tmp_path, files).problems
    assert [f"{blank} of {12 + blank} scans show nothing" in problem for problem in problems] == [True] * refused


def test_blank_scans_never_test_or_calibrate_and_the_others_do_as_before(tmp_path):
    files = {f"Tumor/patient-{i}_a.png": encode(make_pixels(i)) for i in range(20)}
    files |= {f"Normal/patient-{100 + i}_a.png": encode(make_pixels(100 + i)) for i in range(20)}
    files |= {f"Tumor/patient-{i}_blank.png": BLANK[i] for i in range(4)}
    files |= {f"Normal/blank-{i}.png": BLANK[4 + i] for i in range(3)}
    report = checked(tmp_path, files)
    blank = {index for index, scan in enumerate(report.scans) if scan.perceptual_hash == ""}
    assert len(blank) == 7
    for seed in range(6):
        split = split_scans(report, seed)
        assert not blank & {*split.test.tolist(), *split.validation.tolist()}
        assert not leaks(report, split).any
        assert (len(split.test), len(split.validation)) == (8, 4)


def test_different_windows_of_ct_files_are_warned_of(tmp_path):
    values, widths = np.eye(40, dtype=np.int16), {"a1": 400, "a2": 400, "a3": 1500}
    files = {
        f"Tumor/{name}.dcm": make_dicom(values * int(name[1]), WindowCenter=40, WindowWidth=width, PatientID=name)
        for name, width in widths.items()
    }
    report = checked(tmp_path / "a", {**make_files(6), **files})
    assert report.inspection.windows == 2
    assert any("shown with 2 different windows" in warning for warning in report.warnings)
    assert check_dataset(tmp_path / "a", window=(40.0, 400.0)).inspection.windows == 1


# --- samples of what people sent ---


@pytest.mark.skipif(not FIELD.exists(), reason="shared/data is not here")
@pytest.mark.parametrize(("name", "classes", "warning"), ZIPS)
def test_zips_of_the_field(tmp_path, name, classes, warning):
    assert extract_zip(FIELD / "zips" / f"{name}.zip", tmp_path / "out") == ()
    report = check_dataset(tmp_path / "out")
    assert (report.classes, report.problems) == (classes, ())
    assert any(warning in one for one in report.warnings)
    assert not leaks(report, split_scans(report, 0)).any
