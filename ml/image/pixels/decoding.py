"""Decodes PNG, JPEG, BMP, TIFF, WebP, DICOM and NIfTI to one array format: uint8 [height, width, 3], RGB, upright.

The content decides what a file is, never its name. Every `ImageError` has a fixed message without content of the file,
its name or its patient, so it may be logged and shown. Declared sizes are checked before anything is decoded: 50 kB of
PNG can declare 50,000 × 50,000 pixels.

Several frames or pages are several slices. `read` and `decode` refuse such a file unless a frame is named: by its
number, or by "middle" where one answer for the whole object is wanted, which has to say then which frame it is of.

What changes pixels raises `PIXELS_VERSION`. It is part of the cache's key and of every model file's transform, and an
older model is served by the rules that it learnt with (`rules`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ml.image.pixels import dicom, dicom_display, nifti, raster, rules_1
from ml.image.pixels.limits import MAX_BYTES
from ml.image.pixels.picture import Picture, Window
from ml.runtime.errors import ImageError
from ml.spec.headers import dicom as dicom_header
from ml.spec.headers import nifti as nifti_header

if TYPE_CHECKING:
    from pydicom import Dataset

PIXELS_VERSION = 2
"""Of the rules by which a file becomes pixels."""
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom", ".ima"))

Frame = int | Literal["middle"] | None
"""A frame or page, counted from 0; the middle one of several; None: there must be one only."""

_RULES = {1: (rules_1.draw, rules_1.as_shown), PIXELS_VERSION: (dicom_display.draw, raster.as_shown)}


def read(
    source: bytes | Path,
    window: tuple[float, float] | None = None,
    frame: Frame = None,
    rules: int = PIXELS_VERSION,
) -> Picture:
    """Decode a slice of an image file, or of its bytes.

    Args:
        source: a path, or the file's bytes.
        window: centre and width in Hounsfield units, instead of a CT file's own window; ignored for other files.
        frame: which of several frames or pages.
        rules: the version of the pixel rules, from 1 to `PIXELS_VERSION`.

    Raises:
        ImageError: it is not a readable picture, too large, or holds several frames and none is named.
        ValueError: the window's width is below 1.
    """
    return Opened.of(source).read(window, frame, rules)


@dataclass(frozen=True, repr=False)
class Opened:
    """A file that was opened once to read several of its frames. Not for two threads at once."""

    content: bytes
    dataset: Dataset | None = None
    volume: nifti.Volume | None = None

    @classmethod
    def of(cls, source: bytes | Path) -> Opened:
        """Raises ImageError."""
        content = _content(source)
        if is_dicom(content):
            return cls(b"", dataset=dicom.open_picture(content))
        return cls(b"", volume=nifti.open_volume(content)) if is_nifti(content) else cls(content)

    def read(
        self, window: tuple[float, float] | None = None, frame: Frame = None, rules: int = PIXELS_VERSION
    ) -> Picture:
        """See `read` of this module."""
        if window is not None and not window[1] >= 1:
            raise ValueError("A window is at least 1 Hounsfield unit wide.")
        asked = Window(*window) if window else None
        draw_dicom, draw_picture = _RULES[rules]
        choose = partial(_chosen, frame)
        if self.dataset is not None:
            return dicom.read_frame(self.dataset, choose, partial(draw_dicom, asked=asked))
        if self.volume is not None:
            return self.volume.read(choose, asked)
        return raster.read(self.content, choose, draw_picture)


def decode(source: bytes | Path, window: tuple[float, float] | None = None, frame: Frame = None) -> np.ndarray:
    """The pixels alone, uint8 [height, width, 3]; see `read`."""
    return read(source, window, frame).pixels


def frames(source: bytes | Path) -> int:
    """How many slices the file holds: frames of DICOM, slices of a volume, or pages of a picture without previews.

    Raises:
        ImageError: it is not a readable picture.
    """
    content = _content(source)
    if is_dicom(content):
        return dicom.frame_count(dicom.open_dataset(content, header_only=True))
    if is_nifti(content):
        return nifti.open_volume(content).slices
    return raster.page_count(content)


def colour_mode(content: bytes) -> str:
    """How a file stores its colours, by its header: grey, 16-bit, RGB, RGBA, palette, CMYK, … or DICOM.

    Raises ImageError.
    """
    return "DICOM" if is_dicom(content) else raster.colour_mode(content)


def is_dicom(content: bytes) -> bool:
    """Whether the bytes are a DICOM file; see `ml.spec.headers.dicom.begins_dicom`."""
    return dicom_header.begins_dicom(content[: dicom_header.HEAD_BYTES])


def is_nifti(content: bytes) -> bool:
    """Whether the bytes are a NIfTI volume; see `ml.spec.headers.nifti.begins_nifti`."""
    return nifti_header.begins_nifti(content)


def _content(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        if source.stat().st_size > MAX_BYTES:
            raise ImageError(f"The file is larger than {MAX_BYTES // 2**20} MiB.")
        return source.read_bytes()
    except OSError as error:
        raise ImageError("The file cannot be opened.") from error


def _chosen(frame: Frame, frames: int) -> int:
    if frame == "middle":
        return frames // 2
    if frame is None and frames > 1:
        raise ImageError(f"The file holds {frames:,} frames, and each is a slice: send each as a file of its own.")
    chosen = frame or 0
    if not 0 <= chosen < frames:
        raise ImageError(f"The file has no frame {chosen}: it holds {frames:,}, counted from 0.")
    return chosen
