"""Synthetic CT: the properties that the demo, tests and benchmarks rely on."""

import csv
import io
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ml.synthetic.phantom import Slice, generate, make_phantom
from ml.synthetic.phantom_files import Format, main, windowed, write_dataset, write_zip

SIZE = 192
"""Pixels per side: anatomy is in millimetres, so a small image shows the same."""


def make_slices(patients: int = 4, slices: int = 2, seed: int = 7, size: int = SIZE) -> list[Slice]:
    return list(generate(patients, slices, seed, size))


def hu_at(image: Slice, x: float, y: float, reach: float = 3) -> float:
    """Median HU around a point in patient mm, undoing the patient's tilt and shift."""
    patient = make_phantom(image.patient, image.label == "Tumor", image.seed)
    c, s = np.cos(patient.tilt), np.sin(patient.tilt)
    col = (c * x - s * y + patient.shift[0]) / image.spacing + image.hu.shape[1] / 2
    row = (s * x + c * y + patient.shift[1]) / image.spacing + image.hu.shape[0] / 2
    n = max(1, round(reach / image.spacing))
    return float(np.median(image.hu[int(row) - n : int(row) + n + 1, int(col) - n : int(col) + n + 1]))


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others() -> None:
    first, again, other = make_slices(seed=1), make_slices(seed=1), make_slices(seed=2)
    assert all((a.hu == b.hu).all() and a.label == b.label for a, b in zip(first, again, strict=True))
    assert not any((a.hu == b.hu).all() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("file_format", ["png", "dicom"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, file_format: Format) -> None:
    for name in ("a.zip", "b.zip"):
        write_zip(tmp_path / name, 2, 2, 5, file_format, size=SIZE)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_slices_are_512_pixels_square_by_default_in_int16() -> None:
    image = next(iter(generate(1, 1, 0)))
    assert image.hu.shape == image.tumour_mask.shape == (512, 512)
    assert image.hu.dtype == np.int16
    assert image.tumour_mask.dtype == np.bool_


@pytest.mark.parametrize(("patients", "sick"), [(2, 1), (7, 3), (10, 5)])
def test_half_of_the_patients_have_a_tumour_and_all_their_slices_show_it(patients: int, sick: int) -> None:
    labels = defaultdict(set)
    for image in make_slices(patients, 2, size=64):
        labels[image.patient].add(image.label)
    assert sorted(labels) == list(range(1, patients + 1))
    assert all(len(found) == 1 for found in labels.values())
    assert sum(found == {"Tumor"} for found in labels.values()) == sick


def test_only_tumour_slices_have_a_mask_and_it_lies_inside_the_body() -> None:
    for image in make_slices(6, 3):
        assert image.tumour_mask.any() == (image.label == "Tumor")
        assert (image.hu[image.tumour_mask] > -300).all()


def test_a_mass_is_four_to_eight_centimetres_wide() -> None:
    for image in make_slices(10, 2):
        if image.label == "Tumor":
            diameter = 2 * np.sqrt(image.tumour_mask.sum() / np.pi) * image.spacing
            assert 40 < diameter < 80


def test_the_core_of_a_mass_is_darker_than_its_rim() -> None:
    for image in make_slices(6, 2):
        if image.label == "Tumor":
            rows, cols = np.nonzero(image.tumour_mask)
            away = np.hypot(rows - rows.mean(), cols - cols.mean())
            values = image.hu[rows, cols]
            assert values[away < away.max() * 0.3].mean() + 30 < values[away > away.max() * 0.85].mean()


def test_tissues_have_the_hounsfield_units_of_a_contrast_ct() -> None:
    for image in make_slices(6, 2):
        patient = make_phantom(image.patient, False, image.seed)
        assert image.hu[:4].mean() < -950  # air
        assert -130 < hu_at(image, 0, -(patient.ry - patient.fat / 2), 1) < -70  # subcutaneous fat
        assert 80 < hu_at(image, -patient.cavity[0] + 45, -26) < 165  # liver, or a vein in it
        assert 110 < hu_at(image, 7, 3) < 220  # aorta
        assert 120 < hu_at(image, 0, 31) < 250  # cancellous bone


def test_a_patient_is_the_same_body_with_and_without_the_tumour() -> None:
    healthy, sick = make_phantom(3, False, 1), make_phantom(3, True, 1)
    assert sick.tumour is not None
    assert (healthy.kidneys, healthy.rx, healthy.organs_hu) == (sick.kidneys, sick.rx, sick.organs_hu)


def test_the_soft_tissue_window_maps_minus_160_to_black_and_240_to_white() -> None:
    assert windowed(np.array([[-1000, -160, 60, 240, 1500]], np.int16)).tolist() == [[0, 0, 140, 255, 255]]


def test_png_files_hold_the_windowed_pixels_under_names_that_carry_the_patient(tmp_path: Path) -> None:
    assert write_dataset(tmp_path, 2, 2, 3, size=SIZE) == 4
    for image in make_slices(2, 2, 3):
        path = tmp_path / image.label / f"patient-{image.patient:04d}_slice-{image.index:02d}.png"
        assert (np.asarray(Image.open(path)) == windowed(image.hu)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Normal", "Tumor"]


def test_dicom_reads_back_to_the_same_hounsfield_units(tmp_path: Path) -> None:
    write_dataset(tmp_path, 2, 2, 3, "dicom", size=SIZE)
    for image in make_slices(2, 2, 3):
        ds = pydicom.dcmread(tmp_path / image.label / f"{image.name}.dcm")
        assert (pydicom.pixels.apply_modality_lut(ds.pixel_array, ds) == image.hu).all()
        assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert (ds.SOPClassUID, ds.PatientID) == (CTImageStorage, f"PHANTOM-{image.patient:04d}")
        assert float(ds.PixelSpacing[0]) == pytest.approx(image.spacing, abs=1e-4)
        assert (float(ds.WindowCenter), float(ds.WindowWidth)) == (40, 400)


def test_slices_of_one_patient_share_a_series_and_each_has_its_own_instance(tmp_path: Path) -> None:
    write_dataset(tmp_path, 2, 3, 3, "dicom", size=64)
    found = [pydicom.dcmread(path) for path in tmp_path.rglob("*.dcm")]
    assert len({ds.SOPInstanceUID for ds in found}) == 6
    assert len({(ds.PatientID, ds.SeriesInstanceUID, ds.StudyInstanceUID) for ds in found}) == 2


def test_a_zip_has_the_two_class_folders_and_nothing_half_written_beside_it(tmp_path: Path) -> None:
    write_zip(tmp_path / "ct.zip", 4, 1, 0, size=64)
    with zipfile.ZipFile(tmp_path / "ct.zip") as archive:
        names = archive.namelist()
        assert Image.open(io.BytesIO(archive.read(names[0]))).size == (64, 64)
    assert sorted(name.split("/")[0] for name in names) == ["Normal", "Normal", "Tumor", "Tumor"]
    assert [path.name for path in tmp_path.iterdir()] == ["ct.zip"]


def test_the_command_writes_unlabelled_scans_with_the_truth_apart(tmp_path: Path) -> None:
    out = tmp_path / "scans"
    arguments = ["--out", str(out), "--patients", "2", "--slices", "1", "--format", "dicom", "--unlabelled"]
    assert main(arguments) == 0
    with (out / "truth.csv").open() as file:
        truth = {row["file"]: row["label"] for row in csv.DictReader(file)}
    assert sorted(truth) == sorted(path.name for path in out.glob("*.dcm"))
    assert sorted(truth.values()) == ["Normal", "Tumor"]


def test_the_truth_of_an_unlabelled_zip_lies_beside_it(tmp_path: Path) -> None:
    write_zip(tmp_path / "scans.zip", 2, 1, 0, unlabelled=True, size=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scans.truth.csv", "scans.zip"]
    with zipfile.ZipFile(tmp_path / "scans.zip") as archive:
        assert archive.namelist() == ["patient-0001_slice-00.png", "patient-0002_slice-00.png"]


def test_no_patients_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        make_slices(patients=0)
