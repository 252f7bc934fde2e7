"""Files of others: those that pydicom brings along, against an independent decoding, and the field samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from ml.image.pixels.decoding import frames, read
from ml.runtime.errors import ImageError
from tests.field import FIELD

FOLDER = Path(pydicom.data.__file__).parent
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
NAMES = {path.relative_to(FOLDER).as_posix(): path for path in FILES if path.suffix in ("", ".dcm")}

CAUSES = {
    "palettes/": "a colour palette",
    "DICOMDIR": "a directory",
    "liver_": "a segmentation",
    "rtdose": "a radiotherapy dose",
    "badVR": "a radiotherapy dose",
    "rtstruct": "a radiotherapy structure set",
    "rtplan": "a radiotherapy plan",
    "NoMeta": "a radiotherapy ion plan",
    "reportsi": "a structured report",
    "test-SR": "a structured report",
    "waveform": "a waveform",
    # What has no rows or no pixels, or cannot be decoded:
    "chrSQEncoding": "lacks Rows, Columns and PixelData",
    "TINY_ALPHA/PT": "lacks Rows, Columns and PixelData",
    "UN_sequence": "lacks Rows, Columns and PixelData",
    "empty_charset": "lacks Rows, Columns and PixelData",
    "priv_SQ": "lacks Rows",
    "meta_missing_tsyntax": "lacks Rows",
    "no_meta_group_length": "lacks Rows, Columns and PixelData",
    "chrJapMulti": "lacks PixelData",
    "chrKoreanMulti": "lacks PixelData",
    "MR_truncated": "cut off after 8130 of 8192 bytes",
    "JPEG-lossy": r"JPEG Extended \(Process 2 and 4\), 16 bits allocated\) are of a kind that no decoder",
    "JPGExtended": r"JPEG Extended \(Process 2 and 4\), 16 bits allocated\) are of a kind that no decoder",
    "embedded-sequence-delimiter": r"JPEG 2000 Image Compression, 16 bits allocated\) are damaged or cut off",
    # Not DICOM, or one byte off:
    "README": "not a readable",
    "no_meta.dcm": "not a readable",
}
"""Part of the name → part of the refusal."""


def refusal_of(name: str) -> str | None:
    parts = [part for part in CAUSES if part in name]
    return CAUSES[max(parts, key=len)] if parts else None


def independent(path: Path) -> np.ndarray:
    """The middle frame by pydicom's own functions, in floating-point grey levels [rows, columns, 3]."""
    dataset = pydicom.dcmread(path)
    values = pixel_array(dataset, index=int(dataset.get("NumberOfFrames") or 1) // 2)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return apply_color_lut(values, dataset) / 256
    if values.ndim == 3:
        return values if values.dtype == np.uint8 else over(values, *np.percentile(values, [0.5, 99.5]))
    levels = grey(dataset, values)
    return np.repeat((255 - levels if dataset.PhotometricInterpretation == "MONOCHROME1" else levels)[..., None], 3, 2)


def grey(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=float)
    if dataset.get("WindowCenter") is not None:
        # pydicom draws a window over the range that the stored bits span, in the units of the modality.
        bits, signed = dataset.BitsStored, dataset.PixelRepresentation
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
        low, high = apply_modality_lut(ends, dataset) if "RescaleSlope" in dataset else ends
        return over(apply_voi_lut(values, dataset), low, high)
    if dataset.get("Modality") == "CT":
        return over(values, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2)
    return values if dataset.BitsStored <= 8 else over(values, *np.percentile(values, [0.5, 99.5]))


def over(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / (high - low), 0, 1) * 255


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if not refusal_of(name)])
def test_a_file_of_pydicom_looks_as_its_own_functions_show_it(name):
    found = read(NAMES[name], frame="middle")
    assert np.abs(found.pixels - independent(NAMES[name])).max() <= 0.51
    assert frames(NAMES[name]) == found.frames


@pytest.mark.parametrize("name", [name for name in NAMES if refusal_of(name)])
def test_a_file_of_pydicom_that_is_no_picture_is_refused_with_the_cause(name):
    with pytest.raises(ImageError, match=refusal_of(name)):
        read(NAMES[name], frame="middle")


def test_most_files_of_pydicom_are_looked_at():
    assert sum(refusal_of(name) is None for name in NAMES) > 80


# --- the field samples -----------------------------------------------------------------------------------------------

SCANS = FIELD / "scans"
SAMPLES = {path.name: path for path in sorted(SCANS.glob("*")) if ".expected." not in path.name}
REFUSED = {
    "photometricinterpretation-missing.dcm": "lacks PhotometricInterpretation",
    "htj2k-label-no-decoder-here-what-the-error-says.dcm": r"1\.2\.840\.10008\.1\.2\.4\.201 \(High-Thr",
}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in REFUSED])
def test_a_field_sample_looks_like_the_picture_beside_it(name):
    path = SAMPLES[name]
    with Image.open(path.with_name(f"{path.stem}.expected.png")) as picture:
        expected = np.asarray(picture.convert("RGB"), dtype=float)
    assert np.abs(read(path, frame="middle").pixels - expected).mean() <= 2


@pytest.mark.parametrize("name", [name for name in SAMPLES if name in REFUSED])
def test_a_field_sample_without_a_picture_is_refused_with_the_cause(name):
    with pytest.raises(ImageError, match=REFUSED[name]):
        read(SAMPLES[name], frame="middle")
