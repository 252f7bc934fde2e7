"""What a DICOM file declares in its first elements: SOP class, frames, rows and columns (PS3.5 §7, PS3.10 §7).

Not by pydicom: it adds 31 MB to the API process (78 to 110 MB as measured, 121 where numpy is installed), and it
inflates a deflated data set without limit. The worker reads the file with pydicom.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from ml.spec.headers import dicom_classes

PREAMBLE = 128
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
UNDEFINED = 0xFFFFFFFF
META_CLASS, TRANSFER_SYNTAX = (0x0002, 0x0002), (0x0002, 0x0010)
SOP_CLASS, FRAMES, COLUMNS = (0x0008, 0x0016), (0x0028, 0x0008), (0x0028, 0x0011)
SIDES = {(0x0028, 0x0010): "Rows", COLUMNS: "Columns"}
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
MAX_DEPTH = 16
HEADER_BYTES = 4 * 1024 * 1024
"""A deflated data set must show its size within so many inflated bytes."""

HEAD_BYTES = PREAMBLE + 4
"""So many bytes of a file tell whether it is DICOM."""
_VR = rb"(?:AE|AS|AT|CS|DA|DS|DT|IS|LO|LT|OB|OW|PN|SH|SQ|SS|ST|TM|UC|UI|UL|UN|US|UT)"
_BARE = re.compile(
    rb"[\x02\x08]\0.[\0-\x14]" + _VR  # explicit little endian: group, element, VR
    + rb"|\0\x08[\0-\x14]." + _VR  # explicit big endian
    + rb"|\x08\0.[\0-\x14].[\0-\x03]\0\0",  # implicit: group, element, a length of at most 1023 bytes
    re.DOTALL,
)  # fmt: skip


class Header(NamedTuple):
    """What is declared: sides in pixels, and how many pictures of this size there are."""

    rows: int
    columns: int
    frames: int = 1


def begins_dicom(head: bytes) -> bool:
    """Whether a file with these first `HEAD_BYTES` bytes is DICOM: DICM behind a preamble of 128 bytes (part 10), or,
    without a preamble, an element of group 0002 or 0008 at the start."""
    return head[PREAMBLE : PREAMBLE + 4] == b"DICM" or _BARE.match(head) is not None


def is_dicom(stream: IO[bytes]) -> bool:
    """Whether the stream is a DICOM file; see `begins_dicom`. It is rewound."""
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    return begins_dicom(head)


def read(stream: IO[bytes]) -> Header:
    """What the header declares.

    Raises:
        ValueError: it is of a SOP class that is no picture, does not say its size, or is broken. The message names the
            cause, and holds nothing of the file.
    """
    try:
        return _header(*_opened(stream))
    except (struct.error, zlib.error, RecursionError) as error:
        raise ValueError("The DICOM file is damaged, or cut off before its Rows and Columns.") from error


def needed_bytes(stream: IO[bytes]) -> int:
    """The length that a file, which is not deflated, has at least by what its elements declare."""
    try:
        reader, _ = _opened(stream)
        for _ in reader.elements():
            pass
    except (struct.error, ValueError, RecursionError):  # cut off inside the head of an element
        return stream.tell() + 1
    return stream.tell()


def _opened(stream: IO[bytes]) -> tuple[_Reader, str]:
    """A reader at the first element of the data set, and the SOP class that the meta header names."""
    stream.seek(0)
    stream.seek(PREAMBLE + 4 if stream.read(HEAD_BYTES)[PREAMBLE:] == b"DICM" else 0)
    syntax, sop_class = _meta(stream)
    if syntax == DEFLATED:
        stream = _inflated(stream)
    return _Reader(stream, ">" if syntax == BIG_ENDIAN else "<", implicit=syntax == IMPLICIT), sop_class


class _Reader:
    """Elements of a data set, one after the other."""

    def __init__(self, stream: IO[bytes], order: str, implicit: bool) -> None:
        self.stream = stream
        self._order = order
        self._implicit = implicit

    def elements(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """(tag, offset of the value, its length). The values are skipped by whoever iterates on."""
        while head := self.stream.read(4):
            tag = self._tag(head)
            length = self._length(tag)
            offset = self.stream.tell()
            yield tag, offset, length
            self._skip(tag, offset, length)

    def short(self, offset: int) -> int:
        """The unsigned 16-bit number at the offset."""
        self.stream.seek(offset)
        return int(self._unpack("H", self.stream.read(2))[0])

    def text(self, offset: int, length: int) -> str:
        """The short text at the offset, without its padding."""
        self.stream.seek(offset)
        return self.stream.read(min(length, 64)).strip(b"\0 ").decode("ascii", "replace")

    def _length(self, tag: tuple[int, int]) -> int:
        if self._implicit or tag[0] == 0xFFFE:
            return int(self._unpack("I", self.stream.read(4))[0])
        representation = self.stream.read(2)
        if not representation.isalpha():  # some writers name the explicit syntax and write the implicit one
            return int(self._unpack("I", representation + self.stream.read(2))[0])
        if representation in LONG:
            self.stream.read(2)
            return int(self._unpack("I", self.stream.read(4))[0])
        return int(self._unpack("H", self.stream.read(2))[0])

    def _skip(self, tag: tuple[int, int], offset: int, length: int, depth: int = 0) -> None:
        if length != UNDEFINED:
            self.stream.seek(offset + length)
            return
        if depth > MAX_DEPTH:
            raise ValueError("The DICOM file is damaged: its sequences are nested too deeply.")
        end = ITEM_END if tag == ITEM else SEQUENCE_END
        while head := self.stream.read(4):
            inner = self._tag(head)
            inner_length = self._length(inner)
            if inner == end:
                return
            self._skip(inner, self.stream.tell(), inner_length, depth + 1)

    def _unpack(self, form: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(self._order + form, data)

    def _tag(self, head: bytes) -> tuple[int, int]:
        group, element = self._unpack("HH", head)
        return group, element


def _meta(stream: IO[bytes]) -> tuple[str, str]:
    """The transfer syntax and the SOP class of the file meta group (always explicit little endian), if there is one.

    The stream stands at the data set then. Without a meta group, its first element tells the transfer syntax.
    """
    syntax, sop_class, end = "", "", stream.tell()
    if stream.read(2) == b"\x02\0":
        stream.seek(end)
        reader = _Reader(stream, "<", implicit=False)
        for tag, offset, length in reader.elements():
            if tag[0] != TRANSFER_SYNTAX[0]:
                break
            if tag == TRANSFER_SYNTAX:
                syntax = reader.text(offset, length)
            elif tag == META_CLASS:
                sop_class = reader.text(offset, length)
            end = offset + length
    stream.seek(end)
    first = stream.read(6)
    stream.seek(end)
    return syntax or _guessed_syntax(first), sop_class


def _guessed_syntax(first: bytes) -> str:
    """By the first six bytes of a data set: its group is small, and a VR is two capital letters."""
    if first[:1] == b"\0":
        return BIG_ENDIAN
    return EXPLICIT if re.fullmatch(_VR, first[4:6]) else IMPLICIT


def _inflated(stream: IO[bytes]) -> IO[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    return io.BytesIO(inflater.decompress(stream.read(HEADER_BYTES), HEADER_BYTES))


def _header(reader: _Reader, sop_class: str) -> Header:
    sides, frames = dict[str, int](), "1"
    for tag, offset, length in reader.elements():
        if tag == SOP_CLASS:
            sop_class = reader.text(offset, length) or sop_class
        if tag >= SOP_CLASS and (refused := dicom_classes.refusal(sop_class)):
            raise ValueError(refused)
        if tag == FRAMES:
            frames = reader.text(offset, length)
        elif tag in SIDES:
            sides[SIDES[tag]] = reader.short(offset)
        if tag >= COLUMNS:
            break
    missing = " and ".join(name for name in SIDES.values() if name not in sides)
    if missing:
        raise ValueError(dicom_classes.refusal(sop_class) or f"The DICOM file holds no picture: it lacks {missing}.")
    return Header(sides["Rows"], sides["Columns"], int(frames) if frames.isdecimal() else 1)
