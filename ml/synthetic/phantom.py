"""Synthetic abdominal CT at the level of the kidneys, in Hounsfield units (HU).

A phantom is an invented patient: body habitus, organ sizes, contrast phase and scanner noise are drawn by a seed.
Slices are painted in millimetres as soft-edged blobs, back to front, and then covered with noise that has the spectrum
of filtered back-projection. Half of the patients have one enhancing kidney mass with a darker, necrotic core, which is
visible in each of their slices.

Phantoms are for demonstrations, tests and benchmarks; they say nothing about a network's quality on real patients.

Sources. Tissue HU: Lamba et al., AJR 2014 (fat, muscle, fluid, organs before contrast) and Hofer, "CT
Teaching Manual" (bone, enhancement in the portal-venous phase). Solid renal masses enhance less than the parenchyma
around them in the nephrographic phase: Kim et al., AJR 2002. Noise: Riederer, Pelc, Chesler, PMB 1978.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Label = Literal["Normal", "Tumor"]
Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]
Patch = tuple[slice, slice]

INTERCEPT = -1024
"""HU of the stored value 0 in DICOM files, the minimum."""
SLICE_MM = 5.0
AIR, FAT_HU, MUSCLE, FLUID, VEIN, CORTICAL_BONE = -1000.0, -100.0, 60.0, 15.0, 140.0, 520.0


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
    """A mass on one kidney: `bearing` from lateral in radians, `depth` (1 is on the contour), `radius` in mm."""

    kidney: int
    bearing: float
    depth: float
    radius: float
    core: float
    rim_hu: float
    core_hu: float


@dataclass(frozen=True)
class Phantom:
    """One patient: lengths in mm, `tilt` in radians, `noise` in HU (standard deviation at the centre)."""

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
        """The class of this patient's slices."""
        return "Tumor" if self.tumour else "Normal"

    @property
    def cavity(self) -> tuple[float, float]:
        """Half axes of the abdominal cavity, mm."""
        return self.rx - self.fat - self.wall, self.ry - self.fat - self.wall


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
        """File name without suffix; it contains the patient's id (see `ml.image.dataset.patients`)."""
        return f"patient-{self.patient:04d}_slice-{self.index:02d}"


class Canvas:
    """A square image in HU to paint blobs on; coordinates are in patient mm, y towards the back."""

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
        *layers: tuple[float, float],
        angle: float = 0.0,
        rough: float = 0.03,
        soft: float = 1.3,
        square: float = 0.0,
    ) -> tuple[Patch, Floats]:
        """Blend an ellipse with a wavy contour into the image; returns its patch, and its coverage 0 to 1.

        `layers`: (inset in mm, HU) from the outside in. `angle`: radians. `rough`: amplitude of the contour's waves.
        `soft`: width of the edge in pixels. `square`: 0 to 1, from ellipse to rectangle.
        """
        window, u, v = self._local(x, y, max(rx, ry) * 1.3, angle)
        u /= rx
        v /= ry
        uu, vv = u * u, v * v
        radius = np.sqrt(np.maximum(uu + vv - square * uu * vv, 0))
        if rough:
            radius *= self._waves(uu, vv, u * v, rough)
        mean, patch = math.sqrt(rx * ry), self.hu[window]
        slope = -mean / (2 * soft * self.mm)
        radius *= slope
        covers = [np.clip(radius + (0.5 - slope * (1 - inset / mean)), 0, 1) for inset, _ in layers]
        for cover, (_, hu) in zip(covers, layers, strict=True):
            patch += cover * (hu - patch)
        return window, covers[0]

    def _local(self, x: float, y: float, reach: float, angle: float) -> tuple[Patch, Floats, Floats]:
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        col = (c * x - s * y + self.shift[0]) / self.mm + self.size / 2
        row = (s * x + c * y + self.shift[1]) / self.mm + self.size / 2
        span = reach / self.mm + 2
        cols, rows = (slice(max(0, int(m - span)), min(self.size, int(m + span) + 1)) for m in (col, row))
        dx = (np.arange(cols.start, cols.stop, dtype=np.float32) - np.float32(col)) * np.float32(self.mm)
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(row)) * np.float32(self.mm)
        c, s = math.cos(self.tilt + angle), math.sin(self.tilt + angle)
        return (rows, cols), c * dx[None] + s * dy[:, None], c * dy[:, None] - s * dx[None]

    def _waves(self, uu: Floats, vv: Floats, uv: Floats, rough: float) -> Floats:
        """1 + a * cos(2 theta) + b * sin(2 theta) + c * cos(4 theta), without slow trigonometric functions."""
        a, b, c = (float(part) for part in self.rng.normal(0, rough, 3) * (0.7, 0.7, 0.15))
        scale = 1 / (uu + vv + 1e-6)
        cos2, sin2 = (uu - vv) * scale, uv * scale
        wave = 1 + cos2 * (a + 2 * c * cos2) + 2 * b * sin2 - c
        return wave.astype(np.float32, copy=False)


def make_phantom(patient: int, tumour: bool, seed: int) -> Phantom:
    """One patient's anatomy by `(seed, patient)`. The tumour is drawn last, so the rest does not depend on it."""
    rng = np.random.default_rng([seed, patient])
    habitus = rng.uniform(0, 1)  # 0 lean .. 1 heavy: girth and fat go together
    rx = 157 + 13 * habitus + rng.normal(0, 2)
    phantom = Phantom(
        patient=patient,
        seed=seed,
        rx=rx,
        ry=rx * rng.uniform(0.70, 0.77),
        fat=11 + 10 * habitus + rng.uniform(0, 3),
        wall=rng.uniform(9, 13),
        tilt=math.radians(rng.normal(0, 1.0)),
        shift=(rng.normal(0, 2), rng.normal(0, 2)),
        field_mm=340 * rng.uniform(1.08, 1.12) + 10 * habitus,
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
    size, cortex = rng.normal(1, 0.04), rng.uniform(182, 208)
    medulla = cortex - rng.uniform(8, 45)  # the later the phase, the smaller the difference
    pelvis = float(rng.choice([FLUID, FLUID + 20, 260.0], p=[0.5, 0.4, 0.1]))  # urine, or excreted contrast

    def one(side: int) -> Kidney:
        return Kidney(
            x=side * rng.normal(66, 2),
            y=rng.normal(30, 2),
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
        bearing=rng.uniform(-0.5, 0.6),
        depth=rng.uniform(0.65, 0.95),
        radius=rng.uniform(28, 35),
        core=rng.uniform(0.60, 0.74),
        rim_hu=rng.uniform(85, 118),
        core_hu=rng.uniform(8, 28),
    )


def paint(phantom: Phantom, index: int, slices: int, size: int = 512) -> Slice:
    """Paint slice `index` of `slices` evenly spaced through the kidneys, top to bottom."""
    rng = np.random.default_rng([phantom.seed, phantom.patient, index + 1])
    level = 2 * (index + 0.5) / slices - 1 + rng.normal(0, 0.04)  # -1 upper pole .. 1 lower pole
    canvas = Canvas(size, phantom, rng)
    _body(canvas, phantom)
    _bowel(canvas, phantom, rng)
    _organs(canvas, phantom, level)
    _spine(canvas)
    for kidney in phantom.kidneys:
        _kidney(canvas, kidney, level)
    mask = _mass(canvas, phantom, level)
    hu = np.clip(canvas.hu + _noise(phantom, size, rng), INTERCEPT, INTERCEPT + 4095)
    return Slice(np.rint(hu).astype(np.int16), phantom.label, phantom.patient, index, mask, canvas.mm, phantom.seed)


def _body(canvas: Canvas, phantom: Phantom) -> None:
    """Skin, fat, the muscle of the wall, the fat of the cavity, and ribs."""
    fat, wall = phantom.fat, phantom.wall
    skins = ((0, -15), (2, FAT_HU), (fat, MUSCLE), (fat + wall, FAT_HU - 5))
    canvas.blob(0, 0, phantom.rx, phantom.ry, *skins, rough=0.012, square=0.25)
    for bearing in np.linspace(0.45, 1.7, 4) + canvas.rng.uniform(-0.12, 0.12):
        for side in (-1, 1):
            x = side * (phantom.rx - fat - wall / 2) * math.sin(bearing)
            y = (phantom.ry - fat - wall / 2) * math.cos(bearing)
            turn = side * (0.85 * bearing - math.pi / 2)
            canvas.blob(x, y, 4, 9, (0, CORTICAL_BONE), (1.8, 180), angle=turn)


def _bowel(canvas: Canvas, phantom: Phantom, rng: np.random.Generator) -> None:
    """Loops in front: wall, then fluid or stool, with gas on top, since the patient lies on the back."""
    width, depth = phantom.cavity
    for _ in range(14):  # vessels of the mesentery
        cx, cy = rng.uniform(-0.2, 0.6) * width, -depth * rng.uniform(0.05, 0.7)
        canvas.blob(cx, cy, rng.uniform(1, 2), rng.uniform(1, 5), (0, 110), angle=rng.uniform(0, 3))
    for x in np.linspace(-0.35, 0.8, 7):
        r, wall_hu = rng.uniform(10, 17), phantom.organs_hu["bowel"] + 20
        cx, cy = x * width + rng.normal(0, 5), -depth * rng.uniform(0.25, 0.75) * math.sqrt(1 - x * x * 0.7)
        canvas.blob(cx, cy, r * 1.25, r, (0, wall_hu), (3, rng.uniform(15, 45)), angle=rng.uniform(-1, 1), rough=0.07)
        if rng.uniform() < 0.45:
            canvas.blob(cx, cy - r * 0.25, r * 0.8, r * 0.45, (0, -900), rough=0.08)


def _organs(canvas: Canvas, phantom: Phantom, level: float) -> None:
    """Liver on the image's left, spleen on its right, pancreas, great vessels, psoas and back muscles."""
    hu, (width, _), rng = phantom.organs_hu, phantom.cavity, canvas.rng
    liver, spleen = 1 - 0.28 * (level + 1) / 2, 1 - 0.45 * (level + 1) / 2
    canvas.blob(-width + 56 * liver, -26, 52 * liver, 60 * liver, (0, hu["liver"]), angle=0.25, square=0.2)
    for _ in range(5):  # hepatic and portal veins
        x, y = -width + rng.uniform(25, 80) * liver, rng.uniform(-60, 5) * liver
        canvas.blob(x, y, 2.5, rng.uniform(3, 9), (0, hu["liver"] + 38), angle=rng.uniform(0, 3))
    canvas.blob(width - 21, -2, 17 * spleen, 38 * spleen, (0, hu["spleen"]), angle=-0.2, rough=0.05)
    canvas.blob(14, -24, 34, 8, (0, hu["liver"] - 18), angle=-0.25, rough=0.08)
    for side in (-1, 1):
        canvas.blob(side * 29, 42, 11 + 4 * level, 14 + 4 * level, (0, MUSCLE), rough=0.05)
        canvas.blob(side * 30, 76, 25, 17, (0, MUSCLE - 4), angle=side * 0.25)
        canvas.blob(side * 61, 72, 17, 7, (0, MUSCLE - 4), angle=side * -0.35, rough=0.05)
    canvas.blob(7, 3, 10, 10, (0, hu["aorta"]), rough=0.02)
    canvas.blob(-20, 5, 12, 9, (0, hu["cava"]), rough=0.05)


def _spine(canvas: Canvas) -> None:
    """Vertebra: cortical shell, cancellous bone, canal with its sac, arch and processes."""
    for side in (-1, 1):
        canvas.blob(side * 27, 60, 13, 3.5, (0, 330), angle=side * 0.3)
        canvas.blob(side * 13, 54, 4, 9, (0, 420), angle=side * 0.5)
    canvas.blob(0, 82, 3.5, 15, (0, 380))
    canvas.blob(0, 60, 15, 13, (0, CORTICAL_BONE - 60))
    canvas.blob(0, 31, 23, 17.5, (0, CORTICAL_BONE), (1.5, 185 + canvas.rng.normal(0, 12)), square=0.3)
    canvas.blob(0, 56, 11, 9, (0, FAT_HU + 60), (2, 30))


def _kidney(canvas: Canvas, kidney: Kidney, level: float) -> None:
    """Cortex, a ring of medullary pyramids, and near the middle the sinus that opens to the vessels."""
    side, shrink, rng = math.copysign(1, kidney.x), _shrink(level), canvas.rng
    rx, ry, x = kidney.rx * shrink, kidney.ry * shrink, kidney.x + side * 3 * level
    canvas.blob(x, kidney.y, rx, ry, (0, kidney.cortex_hu), angle=kidney.angle)
    for bearing in np.arange(0, 2 * math.pi, math.pi / 4) + rng.uniform(0, 0.8):
        px, py = x + 0.57 * rx * math.cos(bearing), kidney.y + 0.57 * ry * math.sin(bearing)
        canvas.blob(px, py, 6.5 * shrink, 5 * shrink, (0, kidney.medulla_hu), angle=bearing, soft=3)
    opening = kidney.sinus * (1 - level * level)
    if opening < 0.1:
        return
    hx, hy = x - side * rx * 0.62, kidney.y - ry * 0.30
    canvas.blob(hx, hy, rx * 0.55, ry * opening * 0.9, (0, FAT_HU + 15), angle=side * 0.5, rough=0.08, soft=2)
    canvas.blob(hx, hy, rx * 0.38, ry * opening * 0.42, (0, kidney.pelvis_hu), angle=side * 0.5, rough=0.08, soft=2)
    canvas.blob(hx - side * 14, hy - 5, 13, 3, (0, VEIN), angle=side * 0.35, soft=2)


def _shrink(level: float) -> float:
    """Size of a kidney's section at `level` relative to the hilum: the profile of an ellipsoid."""
    return math.sqrt(max(0.1, 1 - 0.45 * level * level))


def _mass(canvas: Canvas, phantom: Phantom, level: float) -> Masks:
    """Paint the enhancing rim and the necrotic core; the mask has the pixels that the mass covers by more than half."""
    mask = np.zeros(canvas.hu.shape, np.bool_)
    tumour = phantom.tumour
    if tumour is None:
        return mask
    kidney = phantom.kidneys[tumour.kidney]
    side, reach = math.copysign(1, kidney.x), tumour.depth * _shrink(level)
    x = kidney.x + side * (3 * level + reach * kidney.rx * math.cos(tumour.bearing))
    y = kidney.y + reach * kidney.ry * math.sin(tumour.bearing)
    r = tumour.radius * math.sqrt(1 - 0.3 * level * level)
    window, cover = canvas.blob(x, y, r, r * 0.94, (0, tumour.rim_hu), rough=0.05, soft=1.8)
    canvas.blob(x + 0.1 * r, y - 0.1 * r, r * tumour.core, r * tumour.core, (0, tumour.core_hu), rough=0.12, soft=5)
    mask[window] = cover > 0.5
    return mask


@lru_cache(maxsize=2)
def _noise_shape(size: int) -> Floats:
    """Amplitude by frequency [size, size // 2 + 1]: filtered back-projection's ramp, then its soft kernel."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    return (f * np.exp(-((f / 0.26) ** 2)) + 0.01).astype(np.float32)  # 0.01: slow mottle


def _noise(phantom: Phantom, size: int, rng: np.random.Generator) -> Floats:
    """Correlated noise in HU, [H, W]; strongest in the middle, where rays pass the most tissue."""
    parts = rng.standard_normal((size, size + 2), np.float32).view(np.complex64)
    field = np.fft.irfft2(parts * _noise_shape(size), s=(size, size)).astype(np.float32, copy=False)
    axis = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(phantom.field_mm / 2)
    depth = np.exp(-((axis[None] / phantom.rx) ** 2)) * np.exp(-((axis[:, None] / phantom.ry) ** 2))
    field *= (0.45 + 0.55 * depth) * np.float32(phantom.noise / field.std())
    return field


def generate(patients: int, slices: int, seed: int, size: int = 512) -> Iterator[Slice]:
    """Slices of all patients in order, `slices` each, [size, size]; half of the patients have a tumour."""
    if patients < 1 or slices < 1:
        raise ValueError(f"patients and slices must be 1 or more, not {patients} and {slices}")
    sick = set(np.random.default_rng(seed).permutation(patients)[: patients // 2].tolist())
    for patient in range(patients):
        phantom = make_phantom(patient + 1, patient in sick, seed)
        yield from (paint(phantom, index, slices, size) for index in range(slices))
