"""Safe reading of uploaded zips, with the standard library only.

`list_members` checks the structure: names, kinds and declared sizes. `Member.read` then checks the actual size, since a
declared size may be wrong on purpose.
"""

import io
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from jobs.errors import BadArchive
from jobs.settings import Settings

ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
IGNORED_NAMES = frozenset(("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"))
RATIO_EXEMPT_BYTES = 1024 * 1024
"""Members up to this size (bytes) may have any compression ratio: a black slice is no zip bomb."""
MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""First bytes of a zip: of a member, or of the end record if it is empty."""
ENCRYPTED = 0x1


@dataclass(frozen=True)
class Limits:
    """Limits of a zip: files, unpacked bytes, unpacked ÷ packed bytes, unpacked bytes of one file."""

    members: int = 100_000
    total_bytes: int = 20 * 1024**3
    ratio: float = 200.0
    member_bytes: int = 512 * 1024**2

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """The limits in the settings."""
        return cls(
            settings.max_archive_members,
            settings.max_archive_bytes,
            settings.max_archive_ratio,
            settings.max_scan_bytes,
        )


@dataclass(frozen=True)
class Member:
    """One file in a zip. `name` is safe: relative, with no `..`, with forward slashes."""

    name: str
    size: int
    packed: int
    _info: zipfile.ZipInfo
    _zip: zipfile.ZipFile

    def read(self) -> bytes:
        """The content, never more than the declared size, which `list_members` has limited.

        Raises:
            BadArchive: the content is damaged, or has another size than declared.
        """
        try:
            with self._zip.open(self._info) as stream:
                content = stream.read(self.size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise BadArchive(f"{self.name!r} cannot be unpacked: the zip is damaged. Pack it again.") from error
        if len(content) != self.size:
            raise BadArchive(f"{self.name!r} is not as large as the zip declares. Pack it again.")
        return content

    def open(self) -> IO[bytes]:
        """The content as a binary stream. Raises as `read`."""
        return io.BytesIO(self.read())


def is_zip(stream: IO[bytes]) -> bool:
    """Whether the stream starts like a zip. Rewinds it."""
    stream.seek(0)
    magic = stream.read(4)
    stream.seek(0)
    return magic in MAGIC


@contextmanager
def open_zip(stream: IO[bytes], limits: Limits, may_be_empty: bool = False) -> Iterator[list[Member]]:
    """The files of a checked zip, readable inside the `with` block.

    Raises:
        BadArchive: not a zip, damaged, or with a refused member, which the message names.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, UnicodeError) as error:
        raise BadArchive("This is not a zip that can be read. Send one zip, packed anew.") from error
    with archive:
        yield list_members(archive, limits, may_be_empty)


def count_members(stream: IO[bytes], limits: Limits, may_be_empty: bool = False) -> int:
    """Check a zip's structure and return its number of files. Raises as `open_zip`."""
    with open_zip(stream, limits, may_be_empty) as members:
        return len(members)


def list_members(archive: zipfile.ZipFile, limits: Limits, may_be_empty: bool = False) -> list[Member]:
    """The files of an open zip, without those in `IGNORED_NAMES`. Raises as `open_zip`."""
    infos = archive.infolist()
    if len(infos) > limits.members:
        raise BadArchive(f"The zip holds {len(infos)} members; at most {limits.members} are taken. Split it.")
    members: dict[str, Member] = {}
    for info in infos:
        name = _safe_name(info)
        if info.is_dir() or IGNORED_NAMES & set(PurePosixPath(name).parts):
            continue
        _check_kind(name, info, limits)
        if name in members:
            raise BadArchive(f"{name!r} is in the zip twice. Keep one of them.")
        members[name] = Member(name, info.file_size, info.compress_size, info, archive)
    _check_whole(members, limits, may_be_empty)
    return list(members.values())


def _safe_name(info: zipfile.ZipInfo) -> str:
    # The original name: ZipInfo.filename is cut at a NUL, and may look harmless only because of that.
    raw = info.orig_filename.replace("\\", "/")
    path = PurePosixPath(raw)
    if "\0" in raw or not raw:
        raise BadArchive("A member of the zip has no readable name.")
    if path.is_absolute() or raw[1:2] == ":":
        raise BadArchive(f"{raw!r} is an absolute path. Pack with relative names.")
    if ".." in path.parts:
        raise BadArchive(f"{raw!r} points outside the zip. Pack without `..`.")
    return str(path)


def _check_kind(name: str, info: zipfile.ZipInfo, limits: Limits) -> None:
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise BadArchive(f"{name!r} is a link or a device. Pack the files themselves.")
    if info.flag_bits & ENCRYPTED:
        raise BadArchive(f"{name!r} is encrypted. Pack without a password.")
    if name.lower().endswith(ARCHIVE_SUFFIXES):
        raise BadArchive(f"{name!r} is an archive inside the zip. Unpack it first.")
    if info.file_size > limits.member_bytes:
        raise BadArchive(f"{name!r} unpacks to more than {limits.member_bytes} bytes.")
    if info.file_size > RATIO_EXEMPT_BYTES and info.file_size > limits.ratio * max(info.compress_size, 1):
        raise BadArchive(f"{name!r} unpacks to more than {limits.ratio:g} times its packed size.")


def _check_whole(members: dict[str, Member], limits: Limits, may_be_empty: bool) -> None:
    if not members and not may_be_empty:
        raise BadArchive("The zip holds no file.")
    unpacked = sum(member.size for member in members.values())
    if unpacked > limits.total_bytes:
        raise BadArchive(f"The zip unpacks to more than {limits.total_bytes} bytes. Split it.")
    packed = sum(member.packed for member in members.values())
    if unpacked > RATIO_EXEMPT_BYTES and unpacked > limits.ratio * max(packed, 1):
        raise BadArchive(f"The zip unpacks to more than {limits.ratio:g} times its own size.")
