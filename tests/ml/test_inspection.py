"""The inspection of a dataset: counts, problems and warnings."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from ml.command.console import dataset_table
from ml.image.dataset.inspection import Inspection, Spread
from ml.image.dataset.perceptual_hash import group_near_duplicates, hash_image, match_any
from ml.image.dataset.scans import DatasetReport, check_dataset, load_manifest, save_manifest
from ml.runtime.archives import extract_zip
from tests.ml.builders import encode, make_dicom, make_files, make_pixels, write_folder
from tests.processes import DATA

NOTHING_TELLS = "Nothing tells the patients"


def make_anatomy(seed: int, height: int = 200, width: int = 240) -> np.ndarray:
    """Organs with edges on black, uint8 [height, width, 3]: the same at any size, and different for each seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    grey = np.zeros((height, width))
    for _ in range(40):
        (top, left), (high, wide) = random.uniform(0.15, 0.85, 2), random.uniform(0.03, 0.2, 2)
        inside = ((y - top) / high) ** 2 + ((x - left) / wide) ** 2 < 1
        grey[inside] = random.uniform(30, 220)
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def inspected(tmp_path, files: dict[str, bytes]) -> DatasetReport:
    return check_dataset(write_folder(files, tmp_path))


def anatomies(count: int = 6, labels: tuple[str, ...] = ("Normal", "Tumor")) -> dict[str, bytes]:
    """A dataset whose only warnings are that its patients are unknown, and that it is small."""
    return {
        f"{label}/{index}.png": encode(make_anatomy(100 * number + index))
        for number, label in enumerate(labels)
        for index in range(count)
    }


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    picture = Image.fromarray(pixels)
    side = (round(picture.width * factor), round(picture.height * factor))
    return np.asarray(picture.resize(side, Image.Resampling.BILINEAR))


# --- what a whole folder is told ---


def test_a_good_folder_gets_one_warning_at_most(tmp_path):
    report = inspected(tmp_path, {name.replace("/", "/patient-0"): one for name, one in anatomies(90).items()})
    assert (report.problems, report.warnings) == (
        (),
        (
            "Patients with scans under several labels: 90. Right if a label is "
            "the slice's, wrong if it is the patient's.",
        ),
    )


def test_counts_of_an_ordinary_folder(tmp_path):
    found = inspected(tmp_path, {**anatomies(), "Tumor/x.png": encode(make_anatomy(7, 64, 100))}).inspection
    assert found.modes == {"RGB": 13}
    assert (found.height, found.width, found.sizes) == (Spread(64, 200, 200), Spread(100, 240, 240), 2)
    assert (found.label_folders, found.broken, found.tiny, found.imbalance) == (2, 0, 0, 1.17)
    assert (found.duplicates, found.near_duplicates, found.patients) == (0, 0, 0)


def test_the_inspection_goes_to_json_and_back(tmp_path):
    found = inspected(
        tmp_path / "data", {**anatomies(), "Normal/ct.dcm": make_dicom(np.eye(40, dtype=np.int16))}
    ).inspection
    assert Inspection.from_json(json.loads(json.dumps(asdict(found)))) == found
    assert Inspection.from_json({}) == Inspection()


def test_the_manifest_is_enough_to_find_near_duplicates_again(tmp_path):
    files = {**anatomies(), "Tumor/again.jpg": encode(make_anatomy(100), "JPEG", quality=60)}
    report = inspected(tmp_path / "data", files)
    save_manifest(report, tmp_path / "manifest.json")
    again = load_manifest(tmp_path / "manifest.json")
    assert again == report
    groups = group_near_duplicates([scan.perceptual_hash for scan in again.scans])
    together = [scan.path for scan, group in zip(again.scans, groups, strict=True) if Counter(groups)[group] > 1]
    assert together == ["Tumor/0.png", "Tumor/again.jpg"]


def test_the_same_folder_gives_the_same_report_every_time(tmp_path):
    folder = write_folder({**make_files(20), **anatomies()}, tmp_path)
    assert len({json.dumps(asdict(check_dataset(folder))) for _ in range(3)}) == 1


# --- each warning ---


def test_tiny_scans_are_warned_of(tmp_path):
    report = inspected(
        tmp_path,
        {
            **anatomies(),
            "Tumor/x.png": encode(make_anatomy(7, 31, 100)),
            "Tumor/y.png": encode(make_anatomy(8, 32, 32)),
        },
    )
    assert report.inspection.tiny == 1
    assert report.warnings[0].startswith("1 scan has a side below 32 pixels")


def test_blank_scans_are_warned_of_and_resemble_nothing(tmp_path):
    blank = {
        f"{label}/{i}-blank.png": encode(np.full((64, 64, 3), 7, np.uint8))
        for i in "ab"
        for label in ("Normal", "Tumor")
    }
    report = inspected(tmp_path, {**anatomies(8), **blank})
    assert report.problems == ()
    assert (report.inspection.blank, report.inspection.near_duplicates, report.inspection.conflicts) == (4, 0, 0)
    assert "4 scans have nothing but one grey level" in report.warnings[0]


def test_copies_are_counted(tmp_path):
    report = inspected(
        tmp_path, {**anatomies(), "Tumor/copy.png": encode(make_anatomy(100)), "Tumor/b.png": encode(make_anatomy(100))}
    )
    assert (report.inspection.duplicates, report.inspection.near_duplicates) == (2, 0)
    assert "2 scans have the same content as another one" in report.warnings[0]


def test_one_picture_under_two_labels_is_a_problem_that_names_both(tmp_path):
    report = inspected(tmp_path, {**anatomies(), "Tumor/copy.png": encode(make_anatomy(0))})
    assert report.inspection.conflicts == 1
    assert report.problems == (
        "Normal/0.png and Tumor/copy.png are the same picture under two labels: keep the right one.",
    )


def test_very_many_contradictions_are_counted(tmp_path):
    pictures = {f"{i}.png": encode(make_anatomy(i, 40, 40)) for i in range(25)}
    report = inspected(
        tmp_path, {f"{label}/{name}": one for label in ("Cyst", "Stone") for name, one in pictures.items()}
    )
    assert len(report.problems) == 21
    assert report.problems[-1] == "5 more pictures lie under two labels."


def test_near_duplicates_are_counted_and_told_from_copies(tmp_path):
    files = {
        **anatomies(),
        "Normal/copy.png": encode(make_anatomy(0)),
        "Normal/small.png": encode(resized(make_anatomy(0), 0.5)),
        "Tumor/jpeg.jpg": encode(make_anatomy(101), "JPEG", quality=50),
    }
    report = inspected(tmp_path, files)
    found = report.inspection
    assert (found.duplicates, found.near_duplicates, found.near_duplicate_groups, found.largest_group) == (1, 4, 2, 2)
    assert found.near_conflicts == 0
    assert "4 scans have near-duplicates" in report.warnings[1]


def test_near_duplicates_under_two_labels_are_warned_of(tmp_path):
    report = inspected(tmp_path, {**anatomies(), "Tumor/jpeg.jpg": encode(make_anatomy(0), "JPEG", quality=50)})
    assert report.problems == ()
    assert "1 group of near-duplicates lies under several labels" in report.warnings[1]


@pytest.mark.parametrize(("few", "warned"), [(7, False), (6, True), (5, True)])
def test_imbalance_is_warned_of_from_one_to_three(tmp_path, few, warned):
    files = {name: one for name, one in anatomies(18).items() if name.startswith("Normal") or int(name[6:-4]) < few}
    warnings = inspected(tmp_path, files).warnings
    assert any("times as many scans as Tumor: set balance" in warning for warning in warnings) == warned


def test_mixed_colour_modes_are_warned_of(tmp_path):
    sixteen = Image.fromarray(make_anatomy(7)[:, :, 0].astype(np.uint16) * 200)
    forms = {
        "Tumor/16.png": encode(sixteen),
        "Tumor/grey.png": encode(make_anatomy(8)[:, :, 0]),
        "Tumor/ct.dcm": make_dicom(np.eye(40, dtype=np.int16) * 1000),
    }
    report = inspected(tmp_path, {**anatomies(), **forms})
    assert report.inspection.modes == {"RGB": 12, "16-bit": 1, "DICOM": 1, "grey": 1}
    assert "Colour modes are mixed (RGB 12, 16-bit 1, DICOM 1, grey 1)" in report.warnings[0]


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_mixed_modalities_are_warned_of_and_what_is_no_modality_is_not_repeated(tmp_path):
    kinds = {"CT": 1, "MR": 2, "DOE^JANE": 3}
    files = {f"Tumor/{i}.dcm": make_dicom(np.eye(40, dtype=np.int16) * i, Modality=name) for name, i in kinds.items()}
    report = inspected(tmp_path, {**anatomies(), **files})
    assert report.inspection.modalities == {"CT": 1, "MR": 1, "other": 1}
    assert "JANE" not in repr(report)


def test_what_is_ignored_is_counted(tmp_path):
    extra = {
        "README.md": b"x",
        "Normal/labels.csv": b"x",
        "stray.png": encode(make_anatomy(7)),
        "__MACOSX/Normal/._0.png": b"x",
        "Normal/.DS_Store": b"x",
    }
    report = inspected(tmp_path, {**anatomies(), **extra})
    assert report.images == 12
    found = report.inspection
    assert (found.ignored_files, found.stray_images, found.junk_files, found.junk_pictures) == (1, 1, 3, 0)
    assert "Images outside of the class folders are ignored: 1." in report.warnings[0]
    assert "put beside scans, are passed over: 3." in report.warnings[1]
    assert "Files that are no pictures are passed over: 1." in report.warnings[2]
    assert report.passed_over == ("stray.png",)


def test_patients_are_counted_and_where_some_are_unknown_it_is_said(tmp_path):
    known = {f"Tumor/patient-{i // 2}_{i}.png": encode(make_anatomy(200 + i)) for i in range(6)}
    report = inspected(tmp_path, {**anatomies(), **known})
    assert (report.inspection.patients, report.inspection.with_patient) == (3, 6)
    assert "The patient is known for 6 of 18 scans" in report.warnings[-1]
    assert NOTHING_TELLS in inspected(tmp_path / "unknown", anatomies()).warnings[-1]


def test_neither_warnings_nor_inspection_name_files_or_patients(tmp_path):
    named = {f"Tumor/patient-{i:04}_DOE-JANE.png": encode(make_anatomy(0)) for i in range(3)}
    coded = {"Normal/ct.dcm": make_dicom(np.eye(20, dtype=np.int16))}
    report = inspected(tmp_path, {**anatomies(2), **named, **coded, "Tumor/torn.png": b"x"})
    said = json.dumps([report.warnings, asdict(report.inspection)])
    assert len(report.warnings) >= 4
    for secret in (
        "JANE",
        "SECRET",
        "Tumor/",
        "torn",
        "ct.dcm",
        *(scan.patient for scan in report.scans if scan.patient),
    ):
        assert secret not in said


def test_broken_scans_are_counted_and_describe_nothing(tmp_path):
    report = inspected(tmp_path, {**anatomies(), "Tumor/torn.png": encode(make_pixels())[:200]})
    torn = next(scan for scan in report.scans if scan.path == "Tumor/torn.png")
    assert (report.inspection.broken, torn.perceptual_hash, torn.height) == (1, None, 0)


def test_an_empty_folder_is_inspected_too(tmp_path):
    assert inspected(tmp_path, {}).inspection == Inspection()


def test_the_table_shows_counts_warnings_and_problems(tmp_path, capsys):
    assert dataset_table(inspected(tmp_path, {**anatomies(), "Tumor/copy.png": encode(make_anatomy(0))})) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "height 200 to 200 (median 200)" in shown
    assert "Nothing tells the patients" in shown
    assert "same picture under two labels" in shown


# --- perceptual hash ---

SAME = {
    "JPEG of quality 90": lambda pixels: np.asarray(Image.open(io.BytesIO(encode(pixels, "JPEG", quality=90)))),
    "JPEG of quality 50": lambda pixels: np.asarray(Image.open(io.BytesIO(encode(pixels, "JPEG", quality=50)))),
    "half the size": lambda pixels: resized(pixels, 0.5),
    "1.37 of the size": lambda pixels: resized(pixels, 1.37),
    "twice the size": lambda pixels: resized(pixels, 2),
    "brighter": lambda pixels: np.clip(pixels.astype(int) + 12, 0, 255).astype(np.uint8),
    "more contrast": lambda pixels: np.clip(pixels * 1.1, 0, 255).astype(np.uint8),
    "less contrast": lambda pixels: (pixels * 0.9).astype(np.uint8),
    "a little noise": lambda pixels: np.clip(
        pixels + np.random.default_rng(0).normal(0, 3, pixels.shape), 0, 255
    ).astype(np.uint8),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("seed", range(5))
def test_the_same_picture_in_another_form_is_a_near_duplicate(change, seed):
    assert match_any([hash_image(SAME[change](make_anatomy(seed)))], [hash_image(make_anatomy(seed))]).tolist() == [
        True
    ]


def test_other_pictures_are_no_near_duplicates():
    groups = group_near_duplicates([hash_image(make_anatomy(seed)) for seed in range(200)])
    assert len(set(groups)) == 200


def test_pictures_that_differ_in_noise_and_place_only_are_not_all_one():
    scans = [hash_image(make_pixels(seed, 64, 64, bright=seed % 2 == 1)) for seed in range(40)]
    assert max(Counter(group_near_duplicates(scans).tolist()).values()) <= 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (31, 33), (32, 32), (3000, 7)])
def test_every_shape_has_a_descriptor(shape):
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    assert len(hash_image(pixels)) in (0, 64)
    assert hash_image(pixels) == hash_image(pixels.copy())


def flipped(descriptor: str, bits: range) -> str:
    content = bytearray.fromhex(descriptor)
    for bit in bits:
        content[bit // 8] ^= 128 >> bit % 8
    return content.hex()


def test_a_bit_more_than_the_limit_is_no_near_duplicate_but_a_third_scan_joins_two():
    first = hash_image(make_anatomy(0))
    near, far = flipped(first, range(18)), flipped(first, range(19))
    assert match_any([near, far], [first]).tolist() == [True, False]
    groups = group_near_duplicates([far, first, None, "", "", near])
    assert groups[0] == groups[1] == groups[5]
    assert len(set(groups)) == 4


def test_groups_are_those_of_all_pairs_compared_one_by_one():
    random = np.random.default_rng(0)
    centres = [random.bytes(31) + b"\0" for _ in range(40)]
    scans = [flipped(centres[i % 40].hex(), random.choice(248, 11, replace=False)) for i in range(700)]
    bits = np.unpackbits(np.array([list(bytes.fromhex(scan)) for scan in scans], dtype=np.uint8), axis=1)
    groups = list(range(700))
    for i in range(700):
        for j in np.flatnonzero((bits[:i] != bits[i]).sum(axis=1) <= 18):
            groups = [groups[i] if group == groups[j] else group for group in groups]
    found = group_near_duplicates(scans)
    assert len(set(zip(groups, found.tolist(), strict=True))) == len(set(groups)) == len(set(found.tolist()))


@pytest.mark.parametrize("alike", [False, True])
def test_ten_thousand_scans_are_compared_in_seconds(alike):
    random = np.random.default_rng(0)
    centre = random.bytes(31).hex() + "00"
    scans = [
        flipped(centre, random.integers(0, 248, 6)) if alike else random.bytes(31).hex() + "00" for _ in range(10_000)
    ]
    started = time.perf_counter()
    assert len(set(group_near_duplicates(scans))) == (1 if alike else 10_000)
    assert time.perf_counter() - started < 20


@pytest.mark.skipif(not (DATA / "mri-465.zip").exists(), reason="shared/data is not here")
def test_real_slices_hold_copies_but_no_giant_group(tmp_path):
    extract_zip(DATA / "mri-465.zip", tmp_path)
    report = check_dataset(tmp_path)
    found = report.inspection
    assert (report.images, report.problems, found.duplicates, found.conflicts) == (465, (), 36, 0)
    assert (found.near_duplicate_groups, found.near_duplicates, found.largest_group) == (17, 37, 3)
    assert found.near_conflicts == 0


def test_fifty_blank_pictures_are_no_dataset_and_so_no_champion(tmp_path):
    blank = encode(np.full((64, 64, 3), 7, np.uint8))
    names = [f"{label}/{number}.png" for label in ("Normal", "Tumor") for number in range(25)]
    report = inspected(tmp_path, dict.fromkeys(names, blank))
    assert any("50 of 50 scans show nothing" in problem for problem in report.problems), report.problems
