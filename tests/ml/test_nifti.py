"""NIfTI volumes: how they lie, by nibabel's own reading; what they show, by the same slices as DICOM."""

from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.spatial.transform import Rotation

from ml.image.dataset.sniffing import is_scan
from ml.image.pixels import decoding
from ml.image.pixels.decoding import Opened, frames, read
from ml.image.pixels.limits import MAX_BYTES
from ml.runtime.errors import ImageError
from ml.spec.headers import nifti as nifti_header
from ml.spec.headers.image import look
from ml.spec.pipeline import RefusedInput
from tests.ml.builders import make_dicom

SPACING = (0.8, 0.7, 5.0)
"""mm towards the left, the back and the head."""


def hounsfield(slices: int = 4, rows: int = 12, columns: int = 10) -> np.ndarray:
    """Values as a CT has them, int16 [slice from the feet, row, column]: no two slices and no sides alike."""
    random = np.random.default_rng(0)
    return random.integers(-1000, 1200, (slices, rows, columns)).astype(np.int16)


def nifti(slices: np.ndarray, codes: str = "LPS", kind: type = nibabel.Nifti1Image, packed: bool = False) -> bytes:
    """Slices [slice, row, column] as a file whose axes run as `codes` says: L, P and S are DICOM's own."""
    as_shown = slices.transpose(2, 1, 0)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = 7.0, 8.0, -30.0
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(tuple(codes)))
    image = kind(apply_orientation(as_shown, turn), affine @ inv_ornt_aff(turn, as_shown.shape))
    image.set_qform(image.affine, 1)
    content = image.to_bytes()
    return gzip.compress(content) if packed else content


ALL_CODES = [
    "".join(codes) for axes in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*axes)
]


@pytest.mark.parametrize("form", range(3), ids=["sform", "qform", "neither"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_the_affine_is_the_one_that_nibabel_reads(kind: type, form: int) -> None:
    for seed in range(40):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() * (0.7, 1.5, 5.0)
        affine[:3, 3] = -120.5, 33.0, 1000.0
        image = kind(np.zeros((3, 4, 5), np.int16), affine)
        image.set_sform(affine if form == 0 else None, int(form == 0))
        image.set_qform(affine if form == 1 else None, int(form == 1))
        content = image.to_bytes()
        found = nifti_header.read(io.BytesIO(content))
        assert np.allclose(found.affine, kind.from_bytes(content).affine[:3], atol=1e-3)
        assert (found.sides, found.volumes) == ((3, 4, 5), 1)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_however_its_axes_lie_the_slices_are_the_same(codes: str) -> None:
    values = hounsfield()
    content = nifti(values, codes)
    assert look(io.BytesIO(content), 10**6) == ("application/x-nifti", 10, 12, 4)
    assert frames(content) == 4
    volume = Opened.of(content)
    for number, one in enumerate(values):
        picture = volume.read(frame=number)
        right = read(make_dicom(one))
        assert np.array_equal(picture.pixels, right.pixels), f"slice {number}"
        assert picture.spacing_mm == pytest.approx((SPACING[1], SPACING[0]))
        assert picture.identity.instance_number == number + 1
        assert picture.identity.position_mm == pytest.approx(-30 + number * SPACING[2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_are_read_plain_and_gzipped(kind: type, packed: bool) -> None:
    content = nifti(hounsfield(), kind=kind, packed=packed)
    assert look(io.BytesIO(content), 10**6).frames == 4
    assert np.array_equal(read(content, frame=2).pixels, read(make_dicom(hounsfield()[2])).pixels)


def test_the_window_is_the_one_that_is_asked_for() -> None:
    picture = read(nifti(hounsfield()), window=(300.0, 1500.0), frame=1)
    assert np.array_equal(picture.pixels, read(make_dicom(hounsfield()[1]), window=(300.0, 1500.0)).pixels)


def test_a_scaled_file_holds_the_values_that_it_stands_for() -> None:
    values = hounsfield()
    image = nibabel.Nifti1Image((values + 1024).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_slope_inter(1.0, -1024.0)  # nibabel takes what it is given for stored values then
    assert np.array_equal(read(image.to_bytes(), frame=0).pixels, read(make_dicom(values[0])).pixels)


MODALITIES = {
    "air": (np.int16, -1000, 1000, "CT"),
    "MR": (np.int16, 0, 4000, "other"),
    "grey levels": (np.uint8, 0, 255, None),
}


@pytest.mark.parametrize(("kind", "low", "high", "modality"), MODALITIES.values(), ids=MODALITIES)
def test_its_values_tell_a_ct_from_anything_else(kind: type, low: int, high: int, modality: str | None) -> None:
    values = np.random.default_rng(1).integers(low, high, (2, 8, 8)).astype(kind)
    assert read(nifti(values), frame=0).origin.modality == modality


def test_a_study_without_uids_is_known_by_its_content() -> None:
    first, again = (read(nifti(hounsfield()), frame=frame).identity for frame in (0, 1))
    other = read(nifti(hounsfield(5)), frame=0).identity
    assert first.study_uid == again.study_uid != other.study_uid
    assert first.study_uid is not None
    assert first.study_uid.startswith("2.25.")
    assert len(first.study_uid) <= 64


def test_without_a_frame_several_slices_are_refused() -> None:
    with pytest.raises(ImageError, match="holds 4 frames"):
        read(nifti(hounsfield()))
    assert read(nifti(hounsfield()), frame="middle").frame == 2


def without_orientation() -> bytes:
    """A volume whose axes have no length."""
    content = bytearray(nifti(hounsfield()))
    content[280:328] = bytes(48)
    return bytes(content)


BROKEN = {
    "cut off": (lambda: nifti(hounsfield())[:600], "damaged or cut off"),
    "several volumes": (
        lambda: nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)).to_bytes(),
        "holds 2 volumes",
    ),
    "complex numbers": (
        lambda: nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)).to_bytes(),
        "colours or complex numbers",
    ),
    "no orientation": (without_orientation, "orientation is broken"),
    "a bomb": (lambda: gzip.compress(nifti(hounsfield()) + bytes(MAX_BYTES), 1), "inflates to more than"),
}


@pytest.mark.parametrize(("content", "cause"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_says_why(content: Callable[[], bytes], cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        read(content(), frame=0)


def test_a_header_that_promises_too_much_is_refused_at_the_door() -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.diag([1.0, 1.0, 1.0, 1.0]))
    content = bytearray(image.to_bytes())
    content[46:48] = (30_000).to_bytes(2, "little")
    with pytest.raises(RefusedInput, match="declares 30000 frames"):
        look(io.BytesIO(bytes(content)), 10**6)


@pytest.mark.parametrize("packed", [False, True])
def test_in_a_dataset_a_volume_is_a_problem_to_name(tmp_path: Path, packed: bool) -> None:
    file = tmp_path / "volume"
    file.write_bytes(nifti(hounsfield(), packed=packed))
    assert is_scan(file)
    with pytest.raises(ImageError, match="each is a slice"):
        read(file)


def test_other_files_are_no_volumes() -> None:
    assert not decoding.is_nifti(gzip.compress(b"a text"))
    assert not decoding.is_nifti(make_dicom(hounsfield()[0]))
    assert not decoding.is_nifti(b"")
