"""Zips from outside, read with suspicion and with the standard library alone.

`checked` looks at a zip's structure: names, kinds, declared sizes. `Member.read` then counts what really comes out,
because a declared size may lie.
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

NESTED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
LITTER = frozenset(("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"))
SMALL = 1024 * 1024
"""Members below this size (bytes) may be packed at any ratio: a black slice is no attack."""
MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""How a zip begins: with a member, or at once with the end of an empty one."""
ENCRYPTED = 0x1


@dataclass(frozen=True)
class Limits:
    """What a zip may be at most: files, unpacked bytes, unpacked ÷ packed bytes, unpacked bytes of one file."""

    members: int = 100_000
    total_bytes: int = 20 * 1024**3
    ratio: float = 200.0
    member_bytes: int = 512 * 1024**2

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """The limits that the settings set."""
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
        """The whole content: never more than the declared size, which `checked` has bounded.

        Raises:
            BadArchive: the content is broken, or not as declared.
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
        """The whole content, to be read as a file. Raises as `read`."""
        return io.BytesIO(self.read())


def is_zip(stream: IO[bytes]) -> bool:
    """Whether the stream begins as a zip does. It is rewound."""
    stream.seek(0)
    magic = stream.read(4)
    stream.seek(0)
    return magic in MAGIC


@contextmanager
def opened(stream: IO[bytes], limits: Limits, may_be_empty: bool = False) -> Iterator[list[Member]]:
    """The files of a zip, checked; readable inside the `with` block.

    Raises:
        BadArchive: the zip is none, is damaged, or holds what is refused; the message names the member.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, UnicodeError) as error:
        raise BadArchive("This is not a zip that can be read. Send one zip, packed anew.") from error
    with archive:
        yield checked(archive, limits, may_be_empty)


def check(stream: IO[bytes], limits: Limits, may_be_empty: bool = False) -> int:
    """Check a zip's structure and return how many files it holds. Raises as `opened`."""
    with opened(stream, limits, may_be_empty) as members:
        return len(members)


def checked(archive: zipfile.ZipFile, limits: Limits, may_be_empty: bool = False) -> list[Member]:
    """The files of an open zip, litter left out. Raises as `opened`."""
    infos = archive.infolist()
    if len(infos) > limits.members:
        raise BadArchive(f"The zip holds {len(infos)} members; at most {limits.members} are taken. Split it.")
    members: dict[str, Member] = {}
    for info in infos:
        name = _safe_name(info)
        if info.is_dir() or LITTER & set(PurePosixPath(name).parts):
            continue
        _check_kind(name, info, limits)
        if name in members:
            raise BadArchive(f"{name!r} is in the zip twice. Keep one of them.")
        members[name] = Member(name, info.file_size, info.compress_size, info, archive)
    _check_whole(members, limits, may_be_empty)
    return list(members.values())


def _safe_name(info: zipfile.ZipInfo) -> str:
    # The original name: ZipInfo.filename is cut at a NUL, and what looks harmless cut may not be so whole.
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
    if name.lower().endswith(NESTED):
        raise BadArchive(f"{name!r} is an archive inside the zip. Unpack it first.")
    if info.file_size > limits.member_bytes:
        raise BadArchive(f"{name!r} unpacks to more than {limits.member_bytes} bytes.")
    if info.file_size > SMALL and info.file_size > limits.ratio * max(info.compress_size, 1):
        raise BadArchive(f"{name!r} unpacks to more than {limits.ratio:g} times its packed size.")


def _check_whole(members: dict[str, Member], limits: Limits, may_be_empty: bool) -> None:
    if not members and not may_be_empty:
        raise BadArchive("The zip holds no file.")
    unpacked = sum(member.size for member in members.values())
    if unpacked > limits.total_bytes:
        raise BadArchive(f"The zip unpacks to more than {limits.total_bytes} bytes. Split it.")
    packed = sum(member.packed for member in members.values())
    if unpacked > SMALL and unpacked > limits.ratio * max(packed, 1):
        raise BadArchive(f"The zip unpacks to more than {limits.ratio:g} times its own size.")
