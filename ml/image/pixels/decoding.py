"""Decodes PNG, JPEG, BMP, TIFF, WebP and DICOM to one array format: uint8 [height, width, 3], RGB.

Every `ImageError` has a fixed message without content of the file, its name or its patient, so it may be logged and
shown. Declared sizes are checked before anything is decoded: 50 kB of PNG can declare 50,000 × 50,000 pixels.
"""

from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ml.runtime.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 50_000_000  # per picture; a chest radiograph has about 10 million
MAX_SIDE = 65_535  # pixels per side, the limit of JPEG and DICOM; some steps need memory per row or column
MAX_BYTES = 256 * 1024 * 1024  # per file, and per inflated DICOM data set
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom", ".ima"))
SOFT_TISSUE = (40.0, 400.0)  # window centre and width in Hounsfield units, the usual one for the abdomen

_MODES = {"1": "grey", "L": "grey", "LA": "grey", "I": "16-bit", "F": "float", "P": "palette", "PA": "palette"}
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_NOT_AN_IMAGE = "The file is not a readable PNG, JPEG, BMP, TIFF, WebP or DICOM image."
_TOO_LARGE = f"The image declares more than {MAX_PIXELS:,} pixels."
_TOO_LONG = f"The image declares a side of more than {MAX_SIDE:,} pixels."
_NO_PIXELS = "The DICOM file holds no readable picture."


def decode(source: bytes | Path, window: tuple[float, float] | None = None) -> np.ndarray:
    """Decode an image file, or its bytes: uint8 [height, width, 3], RGB, upright.

    The first page of multi-page and animated pictures is used, and the middle frame of a multi-frame DICOM file. Grey
    DICOM values are rescaled to the modality's units, and windowed by the linear function of PS3.3 C.11.2.1.2.

    Args:
        source: a path, or the file's bytes.
        window: centre and width in Hounsfield units, instead of a CT file's own window; ignored for other files.

    Raises:
        ImageError: it is not a readable picture, or too large.
        ValueError: the window's width is below 1.
    """
    if window is not None and not window[1] >= 1:
        raise ValueError("A window is at least 1 Hounsfield unit wide.")
    content = source if isinstance(source, bytes) else _read(source)
    if is_dicom(content):
        return _decode_dicom(content, window)
    return _decode_picture(content)


def colour_mode(content: bytes) -> str:
    """How a file stores its colours, by its header: grey, 16-bit, RGB, RGBA, palette, CMYK, … or DICOM.

    Raises ImageError.
    """
    if is_dicom(content):
        return "DICOM"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                return "16-bit" if picture.mode.startswith("I;16") else _MODES.get(picture.mode, picture.mode)
    except Exception as error:
        raise ImageError(_NOT_AN_IMAGE) from error


def is_dicom(content: bytes) -> bool:
    """Whether the bytes are a DICOM file (part 10: a preamble of 128 bytes, then DICM)."""
    return content[128:132] == b"DICM"


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"The file is larger than {MAX_BYTES // 2**20} MiB.")
        return path.read_bytes()
    except OSError as error:
        raise ImageError("The file cannot be opened.") from error


# --- pictures, by Pillow ---------------------------------------------------------------------------------------------


def _decode_picture(content: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                _check_pixels(picture.width, picture.height)
                return np.asarray(_as_rgb(picture), dtype=np.uint8)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_TOO_LARGE) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise ImageError(_NOT_AN_IMAGE) from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(picture, dtype=np.float32))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_black(picture.convert("RGBA"))
    return picture.convert("RGB")


def _on_black(picture: Image.Image) -> Image.Image:
    # Scans have a black background. Just dropping the alpha channel would show hidden colours of transparent pixels.
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture).convert("RGB")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scale to uint8 between minimum and maximum; on the full range, 12 bits stored in 16 would be black."""
    finite = np.nan_to_num(values)
    low, high = float(finite.min()), float(finite.max())
    return _between(finite, low, high)


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    span = max(high - low, 1e-9)
    scaled = (np.clip(values, low, high) - low) * (255.0 / span)
    return np.rint(scaled).astype(np.uint8)


def _check_pixels(width: int, height: int) -> None:
    if width * height <= 0:
        raise ImageError(_NO_PIXELS)
    if width * height > MAX_PIXELS:
        raise ImageError(_TOO_LARGE)
    if max(width, height) > MAX_SIDE:
        raise ImageError(_TOO_LONG)


# --- DICOM, by pydicom with gdcm and pyjpegls ------------------------------------------------------------------------


def _decode_dicom(content: bytes, window: tuple[float, float] | None) -> np.ndarray:
    import pydicom

    _check_inflated_size(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(content))
            _check_pixels(int(dataset.Columns), int(dataset.Rows))
            return _frame_to_rgb(dataset, window)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise ImageError(_NO_PIXELS) from error


def _frame_to_rgb(dataset: Dataset, window: tuple[float, float] | None) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, pixel_array

    frames = int(dataset.get("NumberOfFrames") or 1)
    frame = pixel_array(dataset, index=frames // 2)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        frame = apply_color_lut(frame, dataset)
    if frame.ndim == 3:
        return np.ascontiguousarray(_scaled(frame) if frame.dtype != np.uint8 else frame)
    grey = _windowed(dataset, frame, window)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _windowed(dataset: Dataset, frame: np.ndarray, asked: tuple[float, float] | None) -> np.ndarray:
    """Grey levels as in a DICOM viewer: rescaled to the modality's units, then windowed."""
    from pydicom.pixels import apply_modality_lut

    values = np.asarray(apply_modality_lut(frame, dataset), dtype=np.float32)
    window = (
        asked if asked and dataset.get("Modality") == "CT" else _window_of(dataset)
    )  # only CT is in Hounsfield units
    grey = _linear(values, *window) if window else _scaled(values)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """The linear VOI function of DICOM PS3.3, C.11.2.1.2: from centre - 0.5 - (width - 1)/2 on, width - 1 wide."""
    if width < 1:  # undefined in the standard, but found in files with fractional values
        return _between(values, centre - width / 2, centre + width / 2)
    if width == 1:
        return np.where(values <= centre - 0.5, 0, 255).astype(np.uint8)
    return _between(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _window_of(dataset: Dataset) -> tuple[float, float] | None:
    """(centre, width) of the file's first window, else of the soft tissue window for CT, else None."""
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if centre is not None and width is not None and width > 0:
        return centre, width
    return SOFT_TISSUE if dataset.get("Modality") == "CT" else None


def _first(value: object) -> float | None:
    values = value if isinstance(value, (list, tuple)) or hasattr(value, "__getitem__") else [value]
    try:
        return float(values[0])  # type: ignore[index,arg-type]
    except (TypeError, ValueError, IndexError):
        return None


def _check_inflated_size(content: bytes) -> None:
    # pydicom inflates a deflated data set without limit, so its size is measured first, in bounded memory.
    if _DEFLATED not in content[:2048]:
        return
    group_length = int.from_bytes(content[140:144], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = len(inflater.decompress(content[144 + group_length :], 1 << 20))
        while inflater.unconsumed_tail and inflated <= MAX_BYTES:
            inflated += len(inflater.decompress(inflater.unconsumed_tail, 1 << 20))
    except zlib.error as error:
        raise ImageError(_NO_PIXELS) from error
    if inflated > MAX_BYTES:
        raise ImageError(f"The DICOM data set inflates to more than {MAX_BYTES // 2**20} MiB.")
