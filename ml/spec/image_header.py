"""Is it an image? A look at the header only: nothing is decoded, so a file that lies about its size costs nothing.

The worker decodes, and has the last word. Loaded where scans come in (`Inputs.inspect`), as it imports Pillow.
"""

import warnings
from typing import IO

from PIL import Image

from ml.spec import dicom_header
from ml.spec.pipeline import Media, RefusedInput

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DICOM = "application/dicom"
MAX_SIDE = 65_535
"""Pixels of a side: what JPEG and DICOM can say. The worker takes no more either (ml.image.pixels.decoding)."""


def look(stream: IO[bytes], max_pixels: int) -> Media:
    """What the stream holds, by its header.

    Raises:
        RefusedInput: no PNG, JPEG, BMP, TIFF, WebP or DICOM picture of a sane size.
    """
    found = _dicom(stream) if dicom_header.is_dicom(stream) else _picture(stream)
    width, height = found.width or 0, found.height or 0
    if width <= 0 or height <= 0:
        raise RefusedInput
    if width * height > max_pixels:
        raise RefusedInput(f"The image declares {width} × {height} pixels; at most {max_pixels} are taken.")
    if max(width, height) > MAX_SIDE:
        raise RefusedInput(f"The image declares {width} × {height} pixels; sides of at most {MAX_SIDE} are taken.")
    return found


def _dicom(stream: IO[bytes]) -> Media:
    try:
        rows, columns = dicom_header.size(stream)
    except ValueError:
        raise RefusedInput("This DICOM file holds no picture that can be read.") from None
    return Media(DICOM, columns, rows)


def _picture(stream: IO[bytes]) -> Media:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError:
        raise RefusedInput("The image declares far more pixels than are taken.") from None
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        raise RefusedInput from None
    return Media(Image.MIME[picture.format or ""], picture.width, picture.height)
