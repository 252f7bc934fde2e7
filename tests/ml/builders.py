"""Scans, zips and datasets for the tests of ml/: small, and different for each seed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def make_pixels(seed: int = 0, height: int = 48, width: int = 48, bright: bool = False) -> np.ndarray:
    """A noisy disc, uint8 [height, width, 3]; a bright square in it marks the second class."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 2.4) ** 2) * 90.0
    if bright:
        top, left = random.integers(height // 4, height // 2, 2)
        disc[top : top + height // 5, left : left + width // 5] = 230
    noisy = np.clip(disc + random.normal(20, 6, (height, width)), 0, 255)
    return np.repeat(noisy[:, :, None], 3, axis=2).astype(np.uint8)


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """Pixels (or a Pillow picture) as the bytes of an image file."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return sink.getvalue()


def make_dicom(values: np.ndarray, **attributes: object) -> bytes:
    """A CT file of int16 stored values [height, width] or [frames, height, width]; attributes override its tags."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3.4"
    meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID, ds.Modality = CTImageStorage, "1.2.3.4", "SECRET-77", "CT"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.Rows, ds.Columns = values.shape[-2:]
    if values.ndim == 3:
        ds.NumberOfFrames = len(values)
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = values.astype("<i2").tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    sink = io.BytesIO()
    ds.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def make_files(per_class: int = 6, classes: tuple[str, ...] = ("Normal", "Tumor"), side: int = 48) -> dict[str, bytes]:
    """Name → bytes of a dataset that can be learned: each class its own kind of picture."""
    files = {}
    for number, name in enumerate(classes):
        for index in range(per_class):
            pixels = make_pixels(1000 * number + index, side, side, bright=number % 2 == 1)
            files[f"{name}/{name}-{index:03}.png"] = encode(pixels)
    return files


def write_folder(files: dict[str, bytes], folder: Path) -> Path:
    """The files below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(files: dict[str, bytes], path: Path) -> Path:
    """The files as a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
