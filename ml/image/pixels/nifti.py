"""Reads axial slices of a NIfTI volume as a DICOM viewer shows them: the patient's right on the left, front at the top.

The format names no modality and no window. Values that reach down to air are Hounsfield units, so the volume is a CT;
eight bits are grey levels, of anything; all else is of another modality, and shown by the range of its data. It has no
UIDs either: these are made of its content (PS3.5 B.2), so that the same file is the same study wherever it is sent.
"""

from __future__ import annotations

import hashlib
import io
import math
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml.image.pixels.dicom_display import SOFT_TISSUE
from ml.image.pixels.grey import between, in_range, in_rgb, windowed
from ml.image.pixels.limits import MAX_BYTES, check_size
from ml.image.pixels.picture import Identity, Origin, Picture, Window
from ml.image.pixels.terms import OTHER
from ml.runtime.errors import ImageError
from ml.spec.headers import nifti as nifti_header

AIR = -200.0
"""Hounsfield units below all that is drawn of a body but lung and air, which every CT shows somewhere."""
_DAMAGED = "The NIfTI file is damaged or cut off."


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """`stored`: values as the file stores them, [towards the left, towards the back, towards the head].

    `slope`, `intercept`: of the values. `spacing_mm`: (between rows, between columns). `positions`: of each slice along
    their normal, mm. `uid`: made of the content. `modality`: CT, other, or None where it may be anything.
    """

    stored: np.ndarray
    slope: float
    intercept: float
    spacing_mm: tuple[float, float]
    positions: list[float]
    uid: str
    modality: str | None

    @property
    def slices(self) -> int:
        """How many axial slices it has."""
        return int(self.stored.shape[2])

    def read(self, choose: Callable[[int], int], asked: Window | None) -> Picture:
        """The slice that `choose` takes of so many, counted from the feet; the window only where it is a CT."""
        frame = choose(self.slices)
        values = self._in_units(self.stored[:, :, frame].T)
        window = (asked or SOFT_TISSUE) if self.modality == "CT" else None
        if window is not None:
            levels = windowed(values, window)
        elif self.modality is None:
            levels = between(values, 0, 255)
        else:
            levels = in_range(values)
        place = Identity(self.uid, self.uid, None, frame + 1, position_mm=self.positions[frame])
        return Picture(in_rgb(levels), Origin(self.modality), frame, self.slices, self.spacing_mm, window, place)

    def _in_units(self, stored: np.ndarray) -> np.ndarray:
        if (self.slope, self.intercept) == (1.0, 0.0):
            return stored
        exact = np.result_type(stored.dtype, np.float32)
        return stored.astype(exact) * exact.type(self.slope) + exact.type(self.intercept)


def open_volume(content: bytes) -> Volume:
    """The volume of a file, plain or gzipped.

    Raises:
        ImageError: it cannot be read; the message names the cause.
    """
    try:
        header = nifti_header.read(io.BytesIO(content))
    except ValueError as error:
        raise ImageError(str(error)) from None
    if header.volumes > 1:
        raise ImageError(f"The NIfTI file holds {header.volumes} volumes: send each as a file of its own.")
    left, back, _ = header.axes
    check_size(header.sides[left], header.sides[back])
    stored, slope, intercept = _values(_inflated(content), header)
    stored = _as_shown(stored, header)
    uid = f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(content).hexdigest()).int}"
    steps = [math.hypot(*(row[axis] for row in header.affine)) for axis in (back, left)]
    modality = _modality(stored, slope, intercept)
    return Volume(stored, slope, intercept, (steps[0], steps[1]), _positions(header), uid, modality)


def _inflated(content: bytes) -> bytes:
    """Without gzip, and never more than `MAX_BYTES`: a few kB of gzip can hold gigabytes of zeros."""
    if not content.startswith(nifti_header.GZIP):
        return content
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        inflated = inflater.decompress(content, MAX_BYTES + 1)
    except zlib.error as error:
        raise ImageError(_DAMAGED) from error
    if len(inflated) > MAX_BYTES:
        raise ImageError(f"The NIfTI file inflates to more than {MAX_BYTES // 2**20} MiB.")
    return inflated


def _values(content: bytes, header: nifti_header.Header) -> tuple[np.ndarray, float, float]:
    """The values as stored, [i, j, k], their slope and their intercept."""
    import nibabel

    kind = nibabel.Nifti2Image if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
    try:
        proxy: Any = kind.from_bytes(content).dataobj
        stored = np.asarray(proxy.get_unscaled()).reshape(header.sides, order="F")
        slope, intercept = float(proxy.slope), float(proxy.inter)
    except MemoryError:
        raise
    except Exception as error:  # nibabel raises errors of its own, of numpy and of Python
        raise ImageError(_DAMAGED) from error
    if stored.dtype.kind not in "iuf":
        raise ImageError("The NIfTI file holds colours or complex numbers: send grey values.")
    return stored, slope, intercept


def _as_shown(stored: np.ndarray, header: nifti_header.Header) -> np.ndarray:
    """The axes towards the left, the back and the head of the patient; a view."""
    steps = [header.affine[world][axis] for world, axis in enumerate(header.axes)]
    turned = steps[0] > 0, steps[1] > 0, steps[2] < 0
    return stored.transpose(header.axes)[tuple(slice(None, None, -1 if turn else None) for turn in turned)]


def _positions(header: nifti_header.Header) -> list[float]:
    """Of each slice along the normal of all, mm, as DICOM counts: growing towards the head."""
    affine = np.array(header.affine)
    left, back, head = (affine[:, axis] for axis in header.axes)
    normal = np.cross(left, back)
    normal /= np.linalg.norm(normal) * np.sign(normal @ head) * np.sign(head[2])
    return sorted(float((affine[:, 3] + number * head) @ normal) for number in range(header.slices))


def _modality(stored: np.ndarray, slope: float, intercept: float) -> str | None:
    if stored.dtype.itemsize == 1 and (slope, intercept) == (1.0, 0.0):
        return None
    ends = np.nanmin(stored), np.nanmax(stored)
    least = min(float(end) * slope + intercept for end in ends)
    return "CT" if least <= AIR else OTHER
