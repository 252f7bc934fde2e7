"""What both kinds of files share: how large a picture may be, and its refusal."""

from __future__ import annotations

from ml.runtime.errors import ImageError

MAX_PIXELS = 50_000_000  # per picture; a chest radiograph has about 10 million
MAX_SIDE = 65_535  # pixels per side, the limit of JPEG and DICOM; some steps need memory per row or column
MAX_BYTES = 256 * 1024 * 1024  # per file, and per inflated DICOM data set
TOO_LARGE = f"The image declares more than {MAX_PIXELS:,} pixels."
TOO_LONG = f"The image declares a side of more than {MAX_SIDE:,} pixels."


def check_size(width: int, height: int) -> None:
    """ImageError for a picture without pixels, or with too many; asked before anything is decoded."""
    if width * height <= 0:
        raise ImageError("The image declares no pixels: its width or height is 0.")
    if width * height > MAX_PIXELS:
        raise ImageError(TOO_LARGE)
    if max(width, height) > MAX_SIDE:
        raise ImageError(TOO_LONG)
