"""Is it an image? A look at the header only: nothing is decoded, so a file that lies about its size costs nothing.

The worker decodes, and has the last word.
"""

import warnings
from dataclasses import dataclass
from typing import IO

from PIL import Image

from api.intake import dicom_header
from jobs.errors import NotAnImage

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DICOM = "application/dicom"
MAX_SIDE = 65_535
"""Pixels of a side: what JPEG and DICOM can say. The worker takes no more either (ml.image.pixels.decoding)."""


@dataclass(frozen=True)
class Media:
    """What a scan's header declares: pixels wide and high."""

    media_type: str
    width: int
    height: int


def look(stream: IO[bytes], max_pixels: int) -> Media:
    """What the stream holds, by its header. It is rewound.

    Raises:
        NotAnImage: no PNG, JPEG, BMP, TIFF, WebP or DICOM picture of a sane size.
    """
    stream.seek(0)
    found = _dicom(stream) if dicom_header.is_dicom(stream) else _picture(stream)
    stream.seek(0)
    if found.width <= 0 or found.height <= 0:
        raise NotAnImage
    if found.width * found.height > max_pixels:
        raise NotAnImage(f"The image declares {found.width} × {found.height} pixels; at most {max_pixels} are taken.")
    if max(found.width, found.height) > MAX_SIDE:
        raise NotAnImage(
            f"The image declares {found.width} × {found.height} pixels; sides of at most {MAX_SIDE} are taken."
        )
    return found


def _dicom(stream: IO[bytes]) -> Media:
    try:
        rows, columns = dicom_header.size(stream)
    except ValueError:
        raise NotAnImage("This DICOM file holds no picture that can be read.") from None
    return Media(DICOM, columns, rows)


def _picture(stream: IO[bytes]) -> Media:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError:
        raise NotAnImage("The image declares far more pixels than are taken.") from None
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        raise NotAnImage from None
    return Media(Image.MIME[picture.format or ""], picture.width, picture.height)
