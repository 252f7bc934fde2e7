"""Safe extraction of a zip: into a temporary folder that is then renamed; a refused zip leaves nothing behind."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ml.runtime.errors import ArchiveError

_NESTED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits for a zip of scans."""

    members: int = 200_000
    total_bytes: int = 20 * 2**30
    ratio: float = 200.0  # inflated / stored size of members over 1 MiB; deflate's maximum is 1032
    member_bytes: int = 2**30


def extract_zip(archive: Path, folder: Path, limits: ArchiveLimits | None = None) -> None:
    """Unpack `archive` as `folder`, which is replaced if it exists.

    ArchiveError, without a change to `folder`, for a damaged or encrypted zip, names outside of the folder, links,
    duplicate names, nested archives, and sizes beyond `limits`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if archive.resolve().is_relative_to(folder.resolve()):
        raise ArchiveError("The zip lies inside the folder that it would replace: choose another unzip_dir.")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _extract(archive, staging, limits or ArchiveLimits())
        if folder.exists():
            shutil.rmtree(folder)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: Path, staging: Path, limits: ArchiveLimits) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = checked_members(opened, limits)
            for name, member in members.items():
                _extract_one(opened, member, staging / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ArchiveError("The file is not a whole, readable zip.") from error


def checked_members(opened: zipfile.ZipFile, limits: ArchiveLimits) -> dict[str, zipfile.ZipInfo]:
    """Safe relative name → member, for every file in the zip; ArchiveError if a member or the whole zip is unsafe."""
    infos = opened.infolist()
    if len(infos) > limits.members:
        raise ArchiveError(f"The zip has more than {limits.members:,} members.")
    if sum(info.file_size for info in infos) > limits.total_bytes:
        raise ArchiveError(f"The zip would unpack to more than {limits.total_bytes // 2**20} MiB.")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = _safe_name(info)
        if info.is_dir() or any(part in _LITTER for part in PurePosixPath(name).parts):
            continue
        _check_member(info, name, limits)
        if name in members:
            raise ArchiveError(f"The zip holds the same name twice: {name!r}.")
        members[name] = info
    return members


def _safe_name(info: zipfile.ZipInfo) -> str:
    raw = info.filename.replace("\\", "/")
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if raw.startswith("/") or ".." in parts or ":" in (parts[0] if parts else "") or not raw.isprintable():
        raise ArchiveError(f"The zip holds a name that points outside its folder: {info.filename!r}.")
    return "/".join(parts)


def _check_member(info: zipfile.ZipInfo, name: str, limits: ArchiveLimits) -> None:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise ArchiveError(f"The zip holds a link or a special file: {name!r}.")
    if info.flag_bits & 0x1:
        raise ArchiveError("The zip is encrypted: upload it without a password.")
    if name.lower().endswith(_NESTED):
        raise ArchiveError(f"The zip holds another archive: {name!r}. Unpack that one first.")
    if info.file_size > limits.member_bytes:
        raise ArchiveError(f"The zip holds a file of more than {limits.member_bytes // 2**20} MiB: {name!r}.")
    if info.file_size > 2**20 and info.file_size > limits.ratio * max(info.compress_size, 1):
        raise ArchiveError(f"The zip holds a member that inflates more than {limits.ratio:.0f} times: {name!r}.")


def _extract_one(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads at most the declared size, which is checked above, then compares the CRC: a false size fails here.
    with opened.open(member) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
