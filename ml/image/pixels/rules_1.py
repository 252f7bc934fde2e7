"""The pixel rules of version 1, kept as they were for models that learnt with them (see ml.image.pixels.decoding).

What reads a file, and refuses it, is common to all versions; these are the grey levels alone. Known faults, which
version 2 mends: functional groups, VOI LUTs, VOI functions, padding and HighBit are not looked at, the range without a
window is from the least to the greatest value, min-is-white TIFFs of more than eight bits are not inverted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ml.image.pixels.dicom import decoded
from ml.image.pixels.picture import Picture, Window
from ml.image.pixels.raster import flat

if TYPE_CHECKING:
    from pydicom import Dataset

_SOFT_TISSUE = (40.0, 400.0)


def as_shown(picture: Image.Image, content: bytes) -> np.ndarray:
    """The pixels of a picture, uint8 [height, width, 3]."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return np.asarray(Image.fromarray(_scaled(np.asarray(picture, dtype=np.float32))).convert("RGB"))
    return np.asarray(flat(picture), dtype=np.uint8)


def draw(dataset: Dataset, frame: int, asked: Window | None = None) -> Picture:
    """The frame's pixels, uint8 [rows, columns, 3]."""
    from pydicom.pixels import apply_color_lut

    values = decoded(dataset, frame)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:
        return Picture(np.ascontiguousarray(_scaled(values) if values.dtype != np.uint8 else values))
    grey = _windowed(dataset, values, (asked.centre, asked.width) if asked else None)
    return Picture(np.repeat(grey[:, :, None], 3, axis=2))


def _windowed(dataset: Dataset, values: np.ndarray, asked: tuple[float, float] | None) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    values = np.asarray(apply_modality_lut(values, dataset), dtype=np.float32)
    window = asked if asked and dataset.get("Modality") == "CT" else _window_of(dataset)
    grey = _linear(values, *window) if window else _scaled(values)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    if width < 1:
        return _between(values, centre - width / 2, centre + width / 2)
    if width == 1:
        return np.where(values <= centre - 0.5, 0, 255).astype(np.uint8)
    return _between(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _window_of(dataset: Dataset) -> tuple[float, float] | None:
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if centre is not None and width is not None and width > 0:
        return centre, width
    return _SOFT_TISSUE if dataset.get("Modality") == "CT" else None


def _first(value: object) -> float | None:
    values = value if isinstance(value, (list, tuple)) or hasattr(value, "__getitem__") else [value]
    try:
        return float(values[0])  # type: ignore[index,arg-type]
    except (TypeError, ValueError, IndexError):
        return None


def _scaled(values: np.ndarray) -> np.ndarray:
    finite = np.nan_to_num(values)
    return _between(finite, float(finite.min()), float(finite.max()))


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    span = max(high - low, 1e-9)
    scaled = (np.clip(values, low, high) - low) * (255.0 / span)
    return np.rint(scaled).astype(np.uint8)
