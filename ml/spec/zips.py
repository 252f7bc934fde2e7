"""Safe reading of zips: the one implementation for datasets and batches, with the standard library only.

Opening checks the structure: names, kinds, declared sizes and places. Reading a member then checks its content, since a
declared size may be wrong on purpose. Names are UTF-8 where the zip says so or where they decode as such, else cp437.
"""

from __future__ import annotations

import io
import lzma
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from ml.spec.junk_files import is_junk

ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
PACKED_SCANS = (".nii.gz",)
"""Endings of single scans that are packed by themselves, and are no archives."""
MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""First bytes of a zip: of a member, or of the end record if it is empty."""
RATIO_EXEMPT_BYTES = 2**20
"""Members up to this size may have any compression ratio: a black slice is no zip bomb."""
ENCRYPTED = 0x1 | 0x40
UTF8 = 0x800
UNICODE_PATH = 0x7075
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
LOCAL_HEADER_BYTES = 30
END_RECORD, END_RECORD_BYTES, MOST_COMMENT_BYTES = b"PK\x05\x06", 22, 65_535
CHUNK = 1 << 20
READ_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError,
)  # fmt: skip
"""What zipfile raises on damaged zips. Not MemoryError."""
_DRIVE = re.compile(r"[A-Za-z]:/")

Refuse = Callable[[str], Exception]
"""Makes the caller's own exception of a sentence."""


@dataclass(frozen=True)
class Limits:
    """Limits of a zip: files, unpacked bytes, unpacked ÷ packed bytes, unpacked bytes of one file."""

    members: int = 200_000
    total_bytes: int = 20 * 2**30
    ratio: float = 200.0  # deflate's maximum is 1032
    member_bytes: int = 2**30


@dataclass(frozen=True)
class Member:
    """One file in a zip."""

    name: str
    """Safe: relative, without `..`, with forward slashes, in Unicode's form NFC, control characters as `%09`."""
    packed_name: str
    """As packed, with forward slashes; for comparison only."""
    size: int
    packed: int
    _info: zipfile.ZipInfo
    _zip: zipfile.ZipFile
    _refuse: Refuse

    def chunks(self) -> Iterator[bytes]:
        """The content, never more than the declared size, which the limits bound.

        Raises:
            the caller's exception: the content is damaged, or has another size than declared.
        """
        got = 0
        try:
            with self._zip.open(self._info) as stream:
                while got <= self.size and (chunk := stream.read(CHUNK)):
                    got += len(chunk)
                    yield chunk
        except READ_ERRORS as error:
            detail = f"{self.name!r} cannot be unpacked: the zip is damaged ({_damage(error)}). Pack it again."
            raise self._refuse(detail) from error
        if got != self.size:
            raise self._refuse(f"{self.name!r} is not as large as the zip declares. Pack it again.")

    def read(self) -> bytes:
        """The whole content. Raises as `chunks`."""
        return b"".join(self.chunks())

    def open(self) -> IO[bytes]:
        """The content as a binary stream. Raises as `chunks`."""
        return io.BytesIO(self.read())


class Members(list[Member]):
    """The files of a zip without those that are passed over by their names.

    `junk`: how many were passed over. `guessed_names`: how many names are not UTF-8, and were read as cp437.
    """

    def __init__(self, members: Sequence[Member], junk: int, guessed_names: int) -> None:
        super().__init__(members)
        self.junk, self.guessed_names = junk, guessed_names


def is_zip(stream: IO[bytes]) -> bool:
    """Whether the stream starts like a zip. Rewinds it."""
    stream.seek(0)
    magic = stream.read(4)
    stream.seek(0)
    return magic in MAGIC


@contextmanager
def open_zip(
    source: IO[bytes] | Path, limits: Limits, refuse: Refuse, may_be_empty: bool = False, keep_junk: bool = False
) -> Iterator[Members]:
    """The files of a checked zip, readable inside the `with` block.

    Args:
        source: a file, or a binary stream that can seek.
        limits: what the zip may hold.
        refuse: makes the exception to raise.
        may_be_empty: whether a zip without a file is taken.
        keep_junk: whether files that are passed over by their names are listed too, if they are safe.

    Raises:
        the caller's exception: not a zip, damaged, or with a refused member, which the message names.
    """
    try:
        archive = zipfile.ZipFile(source)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        raise refuse(_why_unreadable(source, error)) from error
    with archive:
        yield _listed(archive, limits, refuse, may_be_empty, keep_junk)


# --- why a zip cannot be read ----------------------------------------------------------------------------------------


def _why_unreadable(source: IO[bytes] | Path, error: Exception) -> str:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return _why_unreadable(stream, error)
    source.seek(0)
    head = source.read(4)
    source.seek(max(source.seek(0, io.SEEK_END) - END_RECORD_BYTES - MOST_COMMENT_BYTES, 0))
    tail = source.read()
    end = tail.rfind(END_RECORD)
    if not head.startswith(b"PK"):
        return "This is not a zip that can be read. Send one zip, packed anew."
    if end < 0 or len(tail) < end + END_RECORD_BYTES:
        return "The zip is cut off: the directory at its end is missing. Send the whole file."
    if tail[end + 4 : end + 6] not in (b"\0\0", b"\xff\xff"):
        return "The zip is one part of several. Join them, or pack one zip."
    if isinstance(error, UnicodeError):
        return "The zip marks names as UTF-8 that are not. Pack it again."
    return "The zip is damaged: its directory cannot be read. Pack it again."


def _damage(error: Exception) -> str:
    if "CRC" in str(error):
        return "wrong checksum"
    return "cut off" if isinstance(error, EOFError) else "broken content"


# --- what it holds ---------------------------------------------------------------------------------------------------


def _listed(archive: zipfile.ZipFile, limits: Limits, refuse: Refuse, may_be_empty: bool, keep_junk: bool) -> Members:
    infos = archive.infolist()
    if len(infos) > limits.members:
        raise refuse(f"The zip holds {len(infos)} members; at most {limits.members} are taken. Split it.")
    members: dict[str, Member] = {}
    junk = guessed = 0
    for info in infos:
        packed_name, is_guess = _packed_name(info)
        name = _safe_name(packed_name, refuse)
        if packed_name.endswith("/"):  # a folder
            continue
        passed_over, why = is_junk(name), _why_refused(name, info, limits)
        junk, guessed = junk + passed_over, guessed + (is_guess and not passed_over)
        if passed_over and (not keep_junk or why or name in members):
            continue
        if why := why or ("is in the zip twice. Keep one of them." if name in members else None):
            raise refuse(f"{name!r} {why}")
        members[name] = Member(name, packed_name, info.file_size, info.compress_size, info, archive, refuse)
    _check_whole(archive, infos, list(members.values()), limits, refuse)
    if not members and not may_be_empty:
        raise refuse("The zip holds no file.")
    return Members(list(members.values()), junk, guessed)


def _packed_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name as packed with forward slashes, and whether its encoding is a guess."""
    # Not ZipInfo.filename: it is cut at a NUL, and may look harmless only because of that.
    name, guessed = info.orig_filename, False
    if not info.flag_bits & UTF8:
        raw = name.encode("cp437")  # which zipfile has decoded it as
        try:
            name = (_unicode_path(info.extra, raw) or raw).decode("utf-8")
        except UnicodeDecodeError:
            guessed = True
    return name.replace("\\", "/"), guessed


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """The name in Info-ZIP's Unicode Path Extra Field, if it is of this name (APPNOTE 4.6.9)."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and content[:1] == b"\1" and content[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return content[5:]
    return None


def safe_part(part: str) -> str:
    """The name of a file or folder as it is stored: NFC; what is not printable and no space as `%09`."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else quote(char, safe="")
        for char in unicodedata.normalize("NFC", part)
    )


def _safe_name(packed_name: str, refuse: Refuse) -> str:
    if packed_name.startswith("/") or _DRIVE.match(packed_name):
        raise refuse(f"{packed_name!r} is an absolute path. Pack with relative names.")
    parts: list[str] = []
    for part in packed_name.split("/"):
        if part == ".." and not parts:
            raise refuse(f"{packed_name!r} points outside the zip. Pack without `..`.")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(safe_part(part))
    if not parts and not packed_name.endswith("/"):
        raise refuse("A member of the zip has no name. Pack it again.")
    return "/".join(parts)


def _why_refused(name: str, info: zipfile.ZipInfo, limits: Limits) -> str | None:
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is a link or a device. Pack the files themselves."
    if info.flag_bits & ENCRYPTED:
        return "is encrypted. Pack without a password."
    if info.volume:
        return "lies in another part of a zip of several parts. Join them, or pack one zip."
    if info.compress_type not in METHODS:
        return f"is compressed by the method {info.compress_type}, which is not read here. Pack with Deflate."
    if name.lower().endswith(ARCHIVE_SUFFIXES) and not name.lower().endswith(PACKED_SCANS):
        return "is an archive inside the zip. Unpack it first."
    if info.file_size > limits.member_bytes:
        return f"unpacks to more than {limits.member_bytes} bytes."
    if info.file_size > RATIO_EXEMPT_BYTES and info.file_size > limits.ratio * max(info.compress_size, 1):
        return f"unpacks to more than {limits.ratio:g} times its packed size."
    return None


def _check_whole(
    archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], members: list[Member], limits: Limits, refuse: Refuse
) -> None:
    unpacked, packed = sum(member.size for member in members), sum(member.packed for member in members)
    if unpacked > limits.total_bytes:
        raise refuse(f"The zip unpacks to more than {limits.total_bytes} bytes. Split it.")
    if unpacked > RATIO_EXEMPT_BYTES and unpacked > limits.ratio * max(packed, 1):
        raise refuse(f"The zip unpacks to more than {limits.ratio:g} times its own size.")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end or _end(info) > archive.start_dir:
            raise refuse("Files in the zip lie over each other: it is damaged, or made to harm. Pack it again.")
        end = _end(info)


def _end(info: zipfile.ZipInfo) -> int:
    """The least offset at which the member can end: its local header may have fields of its own."""
    name = info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437")
    return info.header_offset + LOCAL_HEADER_BYTES + len(name) + info.compress_size
