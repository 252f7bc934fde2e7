"""Whether a file is a scan, by its first bytes. A name can only show that a scan is broken."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ml.image.pixels.decoding import SUFFIXES
from ml.spec.headers.dicom import begins_dicom
from ml.spec.headers.nifti import begins_nifti

_HEAD = 352  # bytes; NIfTI has its magic at 344
_MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF87a", b"GIF89a",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL ", b"8BPS",
)  # fmt: skip
"""PNG, JPEG, TIFF and BigTIFF, GIF, JPEG 2000 (JP2 and codestream), JPEG XL, Photoshop."""
_BOXES = (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypjxl ")


def is_scan(path: Path) -> bool:
    """Whether a file begins as DICOM or as a picture, also of a kind that is not read: that is a problem to name.

    False if it cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            return _begins_as_picture(stream.read(_HEAD))
    except OSError:
        return False


def is_named_as_scan(name: str) -> bool:
    """Whether the suffix is that of a scan: if the content is none, the scan is broken."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _begins_as_picture(head: bytes) -> bool:
    return (
        head.startswith(_MAGIC)
        or begins_dicom(head)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and len(head) > 26)  # the reserved words are 0
        or head[4:12] in _BOXES
        or begins_nifti(head)
        or head[344:348] in (b"n+1\0", b"ni1\0")  # also of a damaged header
    )
