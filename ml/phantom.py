"""Synthetic abdominal CT at the level of the kidneys, in Hounsfield units (HU).

A phantom is one made-up patient: body habitus, organ sizes, contrast phase and scanner noise drawn from a
seed. Slices of it are painted in millimetres as soft-edged blobs, back to front, and then covered with noise
whose spectrum has the shape of filtered back-projection. Half of the patients carry one enhancing kidney mass
with a darker, necrotic core, and every slice written of them shows it.

Good for demonstrations, tests and benchmarks; it says nothing about how a network does on real patients.

Sources. Tissue HU: Lamba et al., AJR 2014 (fat, muscle, fluid, organs before contrast) and Hofer, "CT Teaching
Manual" (bone, enhancement in the portal-venous phase). Solid renal masses enhance less than the parenchyma
around them in the nephrographic phase: Kim et al., AJR 2002. Noise: Riederer, Pelc, Chesler, PMB 1978.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console
from rich.progress import Progress

Format = Literal["png", "dicom"]
Label = Literal["Normal", "Tumor"]
Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]

WINDOW_CENTER, WINDOW_WIDTH = 40, 400
"""Soft-tissue window, HU."""
INTERCEPT = -1024
"""HU of the stored value 0 in the DICOM files."""
SLICE_MM = 5.0
AIR, FAT_HU, MUSCLE, FLUID, CORTICAL_BONE = -1000.0, -100.0, 60.0, 15.0, 520.0


@dataclass(frozen=True)
class Kidney:
    """One kidney's largest axial section: centre and half axes in mm, angle in radians, HU of its parts."""

    x: float
    y: float
    rx: float
    ry: float
    angle: float
    cortex_hu: float
    medulla_hu: float
    pelvis_hu: float
    sinus: float


@dataclass(frozen=True)
class Tumour:
    """A mass on one kidney: `bearing` from lateral in radians, `depth` 1 = centred on the contour, radius in mm."""

    kidney: int
    bearing: float
    depth: float
    radius: float
    core: float
    rim_hu: float
    core_hu: float


@dataclass(frozen=True)
class Phantom:
    """One patient: lengths in mm, `tilt` in radians, `noise` the standard deviation at the centre in HU."""

    patient: int
    seed: int
    rx: float
    ry: float
    fat: float
    wall: float
    tilt: float
    shift: tuple[float, float]
    field_mm: float
    noise: float
    organs_hu: dict[str, float]
    kidneys: tuple[Kidney, Kidney]
    tumour: Tumour | None

    @property
    def label(self) -> Label:
        return "Tumor" if self.tumour else "Normal"


@dataclass(frozen=True)
class Slice:
    """One axial image: `hu` int16 [H, W] in HU, `tumour_mask` bool [H, W], `spacing` in mm a pixel."""

    hu: npt.NDArray[np.int16]
    label: Label
    patient: int
    index: int
    tumour_mask: Masks
    spacing: float
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix; the part before `_slice` is what a split by patient groups by."""
        return f"patient-{self.patient:04d}_slice-{self.index:02d}"


class Canvas:
    """A square image in HU that blobs are painted on; coordinates are patient mm, y towards the back."""

    def __init__(self, size: int, phantom: Phantom, rng: np.random.Generator) -> None:
        self.size, self.mm, self.rng = size, phantom.field_mm / size, rng
        self.tilt, self.shift = phantom.tilt, phantom.shift
        self.hu: Floats = np.full((size, size), AIR, np.float32)

    def blob(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        hu: float,
        angle: float = 0.0,
        rough: float = 0.03,
        soft: float = 1.3,
        square: float = 2.0,
    ) -> tuple[tuple[slice, slice], Floats]:
        """Blend one superellipse with a wavy contour into the image; gives its patch and coverage 0..1."""
        window, u, v = self._local(x, y, max(rx, ry) * 1.35, angle)
        u, v = np.abs(u / rx) if square != 2 else u / rx, np.abs(v / ry) if square != 2 else v / ry
        radius = np.hypot(u, v) if square == 2 else (u**square + v**square) ** (1 / square)
        if rough:
            radius *= self._waves(u, v, rough)
        edge = soft * self.mm / math.sqrt(rx * ry)
        cover = np.clip(0.5 + (1 - radius) / (2 * edge), 0, 1)
        patch = self.hu[window]
        patch += cover * (np.float32(hu) - patch)
        return window, cover

    def _local(
        self, x: float, y: float, reach: float, angle: float
    ) -> tuple[tuple[slice, slice], Floats, Floats]:
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        col = (c * x - s * y + self.shift[0]) / self.mm + self.size / 2
        row = (s * x + c * y + self.shift[1]) / self.mm + self.size / 2
        span = reach / self.mm + 2
        cols, rows = (slice(max(0, int(m - span)), min(self.size, int(m + span) + 1)) for m in (col, row))
        dx = (np.arange(cols.start, cols.stop, dtype=np.float32) - np.float32(col)) * np.float32(self.mm)
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(row)) * np.float32(self.mm)
        c, s = math.cos(self.tilt + angle), math.sin(self.tilt + angle)
        return (rows, cols), c * dx[None] + s * dy[:, None], c * dy[:, None] - s * dx[None]

    def _waves(self, u: Floats, v: Floats, rough: float) -> Floats:
        """1 + the sum of a few cos(k * theta + phase), by angle addition: arctan2 would cost the most of all."""
        r = np.hypot(u, v) + np.float32(1e-6)
        z1 = [u / r, v / r]
        z2 = [z1[0] ** 2 - z1[1] ** 2, 2 * z1[0] * z1[1]]
        z3 = [z2[0] * z1[0] - z2[1] * z1[1], z2[0] * z1[1] + z2[1] * z1[0]]
        wave = np.ones_like(r)
        for k, (cos, sin) in ((2, z2), (3, z3)):
            a, b = self.rng.normal(0, rough * 1.2 / k, 2).astype(np.float32)
            wave += a * cos + b * sin
        return wave


def make_phantom(patient: int, tumour: bool, seed: int) -> Phantom:
    """Draw one patient's anatomy from `(seed, patient)`; the tumour is drawn last, so the rest ignores it."""
    rng = np.random.default_rng([seed, patient])
    habitus = rng.uniform(0, 1)  # 0 lean .. 1 heavy: girth and fat go together
    rx = 146 + 32 * habitus + rng.normal(0, 3)
    phantom = Phantom(
        patient=patient,
        seed=seed,
        rx=rx,
        ry=rx * rng.uniform(0.70, 0.77),
        fat=10 + 18 * habitus + rng.uniform(0, 4),
        wall=rng.uniform(9, 13),
        tilt=math.radians(rng.normal(0, 2.5)),
        shift=(rng.normal(0, 3), rng.normal(0, 4)),
        field_mm=2 * rx * rng.uniform(1.10, 1.18),
        noise=rng.uniform(9, 16) + 4 * habitus,  # heavier patients let fewer photons through
        organs_hu=_organs_hu(rng),
        kidneys=_kidneys(rng),
        tumour=None,
    )
    return replace(phantom, tumour=_tumour(rng)) if tumour else phantom


def _organs_hu(rng: np.random.Generator) -> dict[str, float]:
    """HU in the portal-venous to nephrographic phase."""
    means = {"liver": (108, 9), "spleen": (122, 8), "aorta": (165, 14), "cava": (150, 14), "bowel": (55, 8)}
    return {organ: rng.normal(mean, sd) for organ, (mean, sd) in means.items()}


def _kidneys(rng: np.random.Generator) -> tuple[Kidney, Kidney]:
    size, cortex = rng.normal(1, 0.05), rng.uniform(165, 205)
    medulla = cortex - rng.uniform(8, 45)  # the later the phase, the smaller the difference
    pelvis = float(rng.choice([FLUID, FLUID + 20, 320.0], p=[0.5, 0.3, 0.2]))  # urine, or excreted contrast

    def one(side: int) -> Kidney:
        return Kidney(
            x=side * rng.normal(66, 2),
            y=rng.normal(30, 3),
            rx=size * rng.normal(26, 1.2),
            ry=size * rng.normal(29, 1.2),
            angle=side * math.radians(rng.normal(28, 7)),
            cortex_hu=cortex,
            medulla_hu=medulla,
            pelvis_hu=pelvis,
            sinus=rng.uniform(0.30, 0.42),
        )

    return one(-1), one(1)


def _tumour(rng: np.random.Generator) -> Tumour:
    return Tumour(
        kidney=int(rng.integers(2)),
        bearing=rng.uniform(-1.2, 1.2),
        depth=rng.uniform(0.55, 1.05),
        radius=rng.uniform(15, 23),
        core=rng.uniform(0.5, 0.68),
        rim_hu=rng.uniform(85, 118),
        core_hu=rng.uniform(20, 42),
    )


def paint(phantom: Phantom, index: int, slices: int, size: int = 512) -> Slice:
    """Paint slice `index` of `slices` evenly spaced through the kidneys, top to bottom."""
    rng = np.random.default_rng([phantom.seed, phantom.patient, index + 1])
    level = 2 * (index + 0.5) / slices - 1 + rng.normal(0, 0.04)  # -1 upper pole .. 1 lower pole
    canvas = Canvas(size, phantom, rng)
    _body(canvas, phantom)
    _bowel(canvas, phantom, rng)
    _organs(canvas, phantom, level)
    _spine(canvas, rng)
    for kidney in phantom.kidneys:
        _kidney(canvas, kidney, level, rng)
    mask = (
        _mass(canvas, phantom, phantom.tumour, level) if phantom.tumour else np.zeros((size, size), np.bool_)
    )
    hu = np.clip(canvas.hu + _noise(phantom, size, rng), INTERCEPT, INTERCEPT + 4095)
    return Slice(
        np.rint(hu).astype(np.int16), phantom.label, phantom.patient, index, mask, canvas.mm, phantom.seed
    )


def _body(canvas: Canvas, phantom: Phantom) -> None:
    """Couch, skin, fat, the muscle of the wall, ribs in it, and the fat of the cavity."""
    rx, ry, fat, wall = phantom.rx, phantom.ry, phantom.fat, phantom.wall
    canvas.blob(0, ry * 1.0 + 3, rx * 1.25, 9, -850, rough=0, square=4)
    canvas.blob(0, 0, rx, ry, -15, rough=0.012, square=2.3)
    canvas.blob(0, 0, rx - 2, ry - 2, FAT_HU, rough=0.012, square=2.3)
    canvas.blob(0, 0, rx - fat, ry - fat, MUSCLE, rough=0.012, square=2.3)
    inner_x, inner_y = rx - fat - wall, ry - fat - wall
    canvas.blob(0, -4, inner_x, inner_y, FAT_HU - 5, rough=0.012, square=2.2)
    for bearing in np.linspace(0.35, 1.25, 4) + canvas.rng.uniform(-0.12, 0.12):
        for side in (-1, 1):
            x, y = (
                side * (inner_x + wall / 2) * math.sin(bearing * 1.3),
                (inner_y + wall / 2) * math.cos(bearing * 1.3),
            )
            turn = -side * (math.pi / 2 - bearing * 1.1)
            canvas.blob(x, y, 4, 9, CORTICAL_BONE, turn)
            canvas.blob(x, y, 2, 7, 180, turn)


def _bowel(canvas: Canvas, phantom: Phantom, rng: np.random.Generator) -> None:
    """Loops in front: wall, then fluid, stool or gas that lies on top of it (the patient lies on the back)."""
    width, depth = phantom.rx - phantom.fat - phantom.wall, phantom.ry - phantom.fat - phantom.wall
    for x in np.linspace(-0.35, 0.8, 6):
        r = rng.uniform(10, 17)
        cx, cy = x * width + rng.normal(0, 5), -depth * rng.uniform(0.25, 0.72) * math.sqrt(1 - x * x * 0.7)
        canvas.blob(cx, cy, r * 1.25, r, phantom.organs_hu["bowel"] + 20, rng.uniform(-1, 1), rough=0.08)
        canvas.blob(cx, cy, r * 1.25 - 3, r - 3, rng.uniform(15, 45), rng.uniform(-1, 1), rough=0.06)
        if rng.uniform() < 0.45:
            canvas.blob(cx, cy - r * 0.3, r * 0.8, r * 0.45, -900, rough=0.08)


def _organs(canvas: Canvas, phantom: Phantom, level: float) -> None:
    """Liver on the image's left, spleen on its right, great vessels and psoas along the spine."""
    hu, width = phantom.organs_hu, phantom.rx - phantom.fat - phantom.wall
    liver, spleen = 1 - 0.28 * (level + 1) / 2, 1 - 0.45 * (level + 1) / 2
    canvas.blob(-width + 56 * liver, -26, 52 * liver, 60 * liver, hu["liver"], 0.25, rough=0.05, square=2.3)
    for _ in range(5):  # hepatic and portal veins
        x, y = -width + canvas.rng.uniform(25, 80) * liver, canvas.rng.uniform(-60, 5) * liver
        canvas.blob(x, y, 3, canvas.rng.uniform(3, 9), hu["liver"] + 38, canvas.rng.uniform(0, 3))
    canvas.blob(width - 21, -2, 17 * spleen, 38 * spleen, hu["spleen"], -0.2, rough=0.05)
    canvas.blob(14, -24, 34, 8, hu["liver"] - 18, -0.25, rough=0.08)  # pancreas
    for side in (-1, 1):
        canvas.blob(side * 29, 42, 11 + 4 * level, 14 + 4 * level, MUSCLE, rough=0.05)
        canvas.blob(side * 30, 76, 25, 17, MUSCLE - 4, side * 0.25, rough=0.04)
        canvas.blob(side * 61, 72, 17, 7, MUSCLE - 4, side * -0.35, rough=0.05)
    canvas.blob(7, 3, 10, 10, hu["aorta"], rough=0.02)
    canvas.blob(-20, 5, 12, 9, hu["cava"], rough=0.05)


def _spine(canvas: Canvas, rng: np.random.Generator) -> None:
    """Vertebra: cortical shell, cancellous bone, canal with its sac, arch and processes."""
    for side in (-1, 1):
        canvas.blob(side * 27, 60, 13, 3.5, 330, side * 0.3)  # transverse process
        canvas.blob(side * 13, 54, 4, 9, 420, side * 0.5)
    canvas.blob(0, 82, 3.5, 15, 380)
    canvas.blob(0, 60, 15, 13, CORTICAL_BONE - 60)
    canvas.blob(0, 31, 23, 17.5, CORTICAL_BONE, square=2.4, rough=0.02)
    canvas.blob(0, 31, 21.5, 16, 185 + rng.normal(0, 12), square=2.4, rough=0.02)
    canvas.blob(0, 56, 11, 9, FAT_HU + 60)
    canvas.blob(0, 56, 9, 7, 30)


def _kidney(canvas: Canvas, kidney: Kidney, level: float, rng: np.random.Generator) -> None:
    """Cortex, a ring of medullary pyramids, and near the middle the sinus that opens to the front and middle."""
    side, shrink = math.copysign(1, kidney.x), math.sqrt(1 - 0.45 * level * level)
    rx, ry, x = kidney.rx * shrink, kidney.ry * shrink, kidney.x + side * 3 * level
    canvas.blob(x, kidney.y, rx, ry, kidney.cortex_hu, kidney.angle, rough=0.03)
    for bearing in np.arange(0, 2 * math.pi, math.pi / 4) + rng.uniform(0, 0.8):
        px, py = x + 0.57 * rx * math.cos(bearing), kidney.y + 0.57 * ry * math.sin(bearing)
        canvas.blob(px, py, 6.5 * shrink, 5 * shrink, kidney.medulla_hu, bearing, rough=0.06, soft=3)
    opening = kidney.sinus * max(0.0, 1 - level * level)
    if opening < 0.1:
        return
    hx, hy = x - side * rx * 0.62, kidney.y - ry * 0.30
    canvas.blob(hx, hy, rx * 0.55, ry * opening * 0.9, FAT_HU + 15, side * 0.5, rough=0.08, soft=2)
    canvas.blob(hx, hy, rx * 0.38, ry * opening * 0.42, kidney.pelvis_hu, side * 0.5, rough=0.08, soft=2)
    canvas.blob(hx - side * 14, hy - 5, 13, 3, 140, side * 0.35, soft=2)


def _mass(canvas: Canvas, phantom: Phantom, tumour: Tumour, level: float) -> Masks:
    """Paint the enhancing rim and the necrotic core; the mask [H, W] is where the mass covers half a pixel."""
    kidney = phantom.kidneys[tumour.kidney]
    side, shrink = math.copysign(1, kidney.x), math.sqrt(1 - 0.45 * level * level)
    x = kidney.x + side * (3 * level + tumour.depth * kidney.rx * shrink * math.cos(tumour.bearing))
    y = kidney.y + tumour.depth * kidney.ry * shrink * math.sin(tumour.bearing)
    r = tumour.radius * math.sqrt(1 - 0.35 * level * level)
    window, cover = canvas.blob(x, y, r, r * 0.94, tumour.rim_hu, rough=0.05, soft=1.8)
    off = 0.12 * r
    canvas.blob(x + off, y - off, r * tumour.core, r * tumour.core, tumour.core_hu, rough=0.12, soft=5)
    mask = np.zeros(canvas.hu.shape, np.bool_)
    mask[window] = cover > 0.5
    return mask


def _noise(phantom: Phantom, size: int, rng: np.random.Generator) -> Floats:
    """Correlated noise in HU [H, W], shaped in frequency: a ramp times a Gaussian, and some slow mottle.

    It is strongest in the middle of the body, where the rays have passed the most tissue.
    """
    fy, fx = np.fft.fftfreq(size).astype(np.float32)[:, None], np.fft.rfftfreq(size).astype(np.float32)[None]
    f = np.hypot(fx, fy)
    shape = f * np.exp(-((f / 0.26) ** 2)) + np.float32(0.01)
    parts = rng.standard_normal((2, size, size // 2 + 1), np.float32)
    spectrum = (parts[0] + 1j * parts[1]) * shape
    field = np.fft.irfft2(spectrum, s=(size, size))
    axis = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(phantom.field_mm / 2)
    depth = np.exp(-((axis[None] / phantom.rx) ** 2)) * np.exp(-((axis[:, None] / phantom.ry) ** 2))
    return (field / field.std() * phantom.noise * (0.45 + 0.55 * depth)).astype(np.float32)


def generate(patients: int, slices: int, seed: int, size: int = 512) -> Iterator[Slice]:
    """Slices of all patients in order, `slices` each, [size, size]; half of the patients (floor) have a tumour."""
    if patients < 1 or slices < 1:
        raise ValueError(f"patients and slices must be 1 or more, not {patients} and {slices}")
    sick = set(np.random.default_rng(seed).permutation(patients)[: patients // 2].tolist())
    for patient in range(patients):
        phantom = make_phantom(patient + 1, patient in sick, seed)
        yield from (paint(phantom, index, slices, size) for index in range(slices))


def windowed(hu: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """HU [H, W] to 8-bit grey in the soft-tissue window (centre 40, width 400)."""
    low = WINDOW_CENTER - WINDOW_WIDTH / 2
    return np.rint(np.clip((hu - low) * (255 / WINDOW_WIDTH), 0, 255)).astype(np.uint8)


def png_bytes(image: Slice) -> bytes:
    """An 8-bit grey PNG in the soft-tissue window."""
    out = io.BytesIO()
    Image.fromarray(windowed(image.hu)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def dicom_bytes(image: Slice) -> bytes:
    """A DICOM part-10 file (CT Image Storage, explicit VR little endian); HU = stored value - 1024."""
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
    """Write `Normal/` and `Tumor/` (or, unlabelled, one flat folder with `truth.csv`); gives the slices written."""
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
    """The same as one zip, whole or not at all; unlabelled, `NAME.truth.csv` lies beside it, not inside."""
    truth: list[tuple[str, str]] = []
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(
        part, "w", zipfile.ZIP_STORED if format == "png" else zipfile.ZIP_DEFLATED
    ) as archive:
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
    """`python -m ml phantom --out PATH[.zip] …`: write a data set with a progress bar on stderr; 0 when done."""
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
