"""Is it an image? A look at the header only: nothing is decoded, so a file that lies about its size costs nothing.

The worker decodes, and has the last word. Loaded where scans come in (`Inputs.inspect`), as it imports Pillow.
"""

import warnings
from functools import cache
from typing import IO

from PIL import Image, TiffImagePlugin

from ml.spec.headers import dicom as dicom_header
from ml.spec.headers import nifti as nifti_header
from ml.spec.pipeline import Media, RefusedInput

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DICOM, NIFTI = "application/dicom", "application/x-nifti"
MAX_SIDE = 65_535
"""Pixels of a side: what JPEG and DICOM can say. The worker takes no more either (ml.image.pixels.limits)."""
MAX_FRAMES = 10_000
"""Frames of a DICOM file and slices of a volume: a header may declare any number, and each is a row."""

_MORE_TIFF = {
    (order, min_is_white, (sample_format,), 1, (bits,), ()): (mode, raw)
    for order, sample_format, bits, mode, raw in (
        (b"II", 1, 16, "I;16", "I;16"),
        (b"MM", 1, 16, "I;16B", "I;16B"),
        (b"II", 2, 16, "I", "I;16S"),
        (b"MM", 2, 16, "I", "I;16BS"),
        (b"II", 1, 32, "I", "I;32N"),
        (b"MM", 1, 32, "I", "I;32BS"),
        (b"II", 2, 32, "I", "I;32S"),
        (b"MM", 2, 32, "I", "I;32BS"),
    )
    for min_is_white in (0, 1)
}
"""Kinds of grey TIFF for Pillow's table (byte order, photometric interpretation, sample format, fill order, bits,
extra samples) → (mode, raw mode). It knows most of them with black as the least value only. Whoever decodes inverts:
Pillow does so for up to 8 bits alone (ml.image.pixels.raster). Unsigned 32 bits come as signed ones."""


def open_picture(stream: IO[bytes]) -> Image.Image:
    """Pillow's picture of a stream, of which only the header is read. Raises, and warns of, whatever Pillow does."""
    _add_kinds_of_tiff()
    return Image.open(stream, formats=FORMATS)


@cache
def _add_kinds_of_tiff() -> None:
    TiffImagePlugin.OPEN_INFO.update({kind: _MORE_TIFF[kind] for kind in _MORE_TIFF.keys() - TiffImagePlugin.OPEN_INFO})


def look(stream: IO[bytes], max_pixels: int) -> Media:
    """What the stream holds, by its header.

    Raises:
        RefusedInput: no PNG, JPEG, BMP, TIFF, WebP, DICOM or NIfTI picture of a sane size.
    """
    found = _looked_at(stream)
    width, height = found.width or 0, found.height or 0
    if width <= 0 or height <= 0:
        raise RefusedInput
    if width * height > max_pixels:
        raise RefusedInput(f"The image declares {width} × {height} pixels; at most {max_pixels} are taken.")
    if max(width, height) > MAX_SIDE:
        raise RefusedInput(f"The image declares {width} × {height} pixels; sides of at most {MAX_SIDE} are taken.")
    if found.frames > MAX_FRAMES:
        raise RefusedInput(f"The file declares {found.frames} frames; at most {MAX_FRAMES} are taken.")
    return found


def _looked_at(stream: IO[bytes]) -> Media:
    if dicom_header.is_dicom(stream):
        return _dicom(stream)
    return _volume(stream) if nifti_header.is_nifti(stream) else _picture(stream)


def _volume(stream: IO[bytes]) -> Media:
    try:
        header = nifti_header.read(stream)
    except ValueError as error:
        raise RefusedInput(str(error)) from None
    if header.volumes > 1:
        raise RefusedInput(f"The NIfTI file holds {header.volumes} volumes: send each as a file of its own.")
    width, height, _ = (header.sides[axis] for axis in header.axes)
    return Media(NIFTI, width, height, header.slices)


def _dicom(stream: IO[bytes]) -> Media:
    try:
        header = dicom_header.read(stream)
    except ValueError as error:
        raise RefusedInput(str(error)) from None
    return Media(DICOM, header.columns, header.rows, max(header.frames, 1))


def _picture(stream: IO[bytes]) -> Media:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = open_picture(stream)
    except Image.DecompressionBombError:
        raise RefusedInput("The image declares far more pixels than are taken.") from None
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        raise RefusedInput from None
    # A JPEG with a preview or a gain map behind it, as phones write them, is called MPO by Pillow.
    kind = "JPEG" if picture.format == "MPO" else picture.format or ""
    return Media(Image.MIME[kind], picture.width, picture.height)
