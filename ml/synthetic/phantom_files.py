"""Synthetic CT as files: PNG and DICOM, folders and zips, and the command `python -m ml phantom`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console
from rich.progress import Progress

from ml.synthetic.phantom import INTERCEPT, SLICE_MM, Slice, generate

Format = Literal["png", "dicom"]

WINDOW_CENTER, WINDOW_WIDTH = 40, 400
"""Soft-tissue window, HU."""


def windowed(hu: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """HU [H, W] to 8-bit grey in the soft-tissue window (centre 40, width 400)."""
    low = WINDOW_CENTER - WINDOW_WIDTH / 2
    return np.rint(np.clip((hu - low) * (255 / WINDOW_WIDTH), 0, 255)).astype(np.uint8)


def png_bytes(image: Slice) -> bytes:
    """The slice as an 8-bit grey PNG in the soft-tissue window."""
    out = io.BytesIO()
    Image.fromarray(windowed(image.hu)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def dicom_bytes(image: Slice) -> bytes:
    """The slice as a DICOM part-10 file (CT Image Storage, explicit VR little endian); HU = stored value - 1024."""
    patient = f"PHANTOM-{image.patient:04d}"
    series = f"renalq-{image.seed}-{image.patient}"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, image.label, str(image.index)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = io.BytesIO()
    ds = FileDataset(out, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[series, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[series, "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[series, "frame"])
    ds.PatientID, ds.PatientName, ds.PatientSex, ds.PatientBirthDate = (
        patient,
        f"{patient}^Synthetic",
        "O",
        "",
    )
    ds.Modality, ds.Manufacturer, ds.ImageType = "CT", "RenalQ phantom", ["DERIVED", "SECONDARY", "AXIAL"]
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20000101", "000000", "1", ""
    ds.ReferringPhysicianName, ds.BodyPartExamined, ds.KVP = "", "ABDOMEN", "120"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 1, 1, image.index + 1
    _pixels(ds, image)
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _pixels(ds: FileDataset, image: Slice) -> None:
    rows, columns = image.hu.shape
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(INTERCEPT), "1", "HU"
    ds.WindowCenter, ds.WindowWidth = str(WINDOW_CENTER), str(WINDOW_WIDTH)
    ds.PixelSpacing = [f"{image.spacing:.5f}"] * 2
    ds.SliceThickness, ds.SliceLocation = f"{SLICE_MM}", f"{-image.index * SLICE_MM}"
    ds.ImagePositionPatient = [f"{-image.spacing * n / 2:.3f}" for n in (columns, rows)] + [ds.SliceLocation]
    ds.ImageOrientationPatient, ds.PatientPosition, ds.PositionReferenceIndicator = (
        [1, 0, 0, 0, 1, 0],
        "HFS",
        "",
    )
    ds.PixelData = (image.hu - np.int16(INTERCEPT)).astype("<u2").tobytes()


def _named(image: Slice, file_format: Format, unlabelled: bool) -> tuple[str, bytes]:
    name = image.name + (".png" if file_format == "png" else ".dcm")
    data = png_bytes(image) if file_format == "png" else dicom_bytes(image)
    return (name if unlabelled else f"{image.label}/{name}"), data


def _ignore() -> None: ...


def write_dataset(
    folder: Path,
    patients: int,
    slices: int,
    seed: int,
    format: Format = "png",
    *,
    unlabelled: bool = False,
    size: int = 512,
    on_slice: Callable[[], None] = _ignore,
) -> int:
    """Write `Normal/` and `Tumor/` (or, unlabelled, one flat folder and `truth.csv`); returns the number of slices."""
    truth: list[tuple[str, str]] = []
    for image in generate(patients, slices, seed, size):
        name, data = _named(image, format, unlabelled)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        truth.append((name, image.label))
        on_slice()
    if unlabelled:
        _write_truth(folder / "truth.csv", truth)
    return len(truth)


def write_zip(
    path: Path,
    patients: int,
    slices: int,
    seed: int,
    format: Format = "png",
    *,
    unlabelled: bool = False,
    size: int = 512,
    on_slice: Callable[[], None] = _ignore,
) -> int:
    """The same as a zip, atomically; unlabelled, with `NAME.truth.csv` beside it. Returns the number of slices."""
    truth: list[tuple[str, str]] = []
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED if format == "png" else zipfile.ZIP_DEFLATED) as archive:
        for image in generate(patients, slices, seed, size):
            name, data = _named(image, format, unlabelled)
            # A fixed time (ZipInfo's default, 1980), so that the same seed gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name), data, archive.compression, 1)
            truth.append((name, image.label))
            on_slice()
    part.replace(path)
    if unlabelled:
        _write_truth(path.with_suffix(".truth.csv"), truth)
    return len(truth)


def _write_truth(path: Path, truth: Sequence[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *truth])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ml phantom --out PATH[.zip] …`: write a dataset, with progress on stderr; returns 0."""
    args = _parser().parse_args(argv)
    write = write_zip if args.out.suffix == ".zip" else write_dataset
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("synthetic CT", total=args.patients * args.slices)
        count = write(
            args.out,
            args.patients,
            args.slices,
            args.seed,
            args.format,
            unlabelled=args.unlabelled,
            on_slice=lambda: progress.advance(task),
        )
    print(f"{count} slices of {args.patients} patients in {args.out}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ml phantom", description="Write synthetic abdominal CT.")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a path that ends in .zip")
    parser.add_argument("--patients", type=_positive, default=80)
    parser.add_argument("--slices", type=_positive, default=4, help="of each patient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=["png", "dicom"], default="png")
    parser.add_argument("--unlabelled", action="store_true", help="flat, no label in names, truth in a CSV")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
