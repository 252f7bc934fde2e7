"""Safe extraction of a zip: into a temporary folder that is then renamed; a refused zip leaves nothing behind."""

from __future__ import annotations

import errno
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ml.runtime.errors import ArchiveError
from ml.spec.junk_files import is_junk
from ml.spec.zips import Limits as ArchiveLimits
from ml.spec.zips import Member, open_zip

MOST_NAME_BYTES = 255
"""Of a file or folder; the limit of ext4, XFS, APFS and NTFS."""
MOST_PATH_BYTES = 3000
"""Of a whole name in the zip; Linux takes 4096 bytes with the folders above."""
MOST_FOLDERS = 64
"""One in the other."""
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""What file systems answer whose rules for names are stricter."""


def extract_zip(archive: Path, folder: Path, limits: ArchiveLimits | None = None) -> tuple[str, ...]:
    """Unpack `archive` as `folder`, which is replaced if it exists. Returns warnings, for whoever sent the zip.

    Files that are passed over by their names (`ml.spec.junk_files`) are unpacked too if they are safe, so that
    whoever reads the folder can count and name them.

    ArchiveError, without a change to `folder`, for what `ml.spec.zips` refuses, and for names that the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if archive.resolve().is_relative_to(folder.resolve()):
        raise ArchiveError("The zip lies inside the folder that it would replace: choose another unzip_dir.")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        warnings = _extract(archive, staging, limits or ArchiveLimits())
        if folder.exists():
            shutil.rmtree(folder)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return warnings


def _extract(archive: Path, staging: Path, limits: ArchiveLimits) -> tuple[str, ...]:
    with open_zip(archive, limits, ArchiveError, may_be_empty=True, keep_junk=True) as members:
        for member in _storable(members):
            _extract_one(member, staging / member.name)
        return tuple(_warnings(members.guessed_names))


def _warnings(guessed_names: int) -> list[str]:
    if not guessed_names:
        return []
    return [
        f"Names in the zip that are not UTF-8: {guessed_names}. They were read as cp437, so letters such as umlauts "
        "may be wrong: pack with UTF-8 names if a class is affected."
    ]


def _storable(members: Sequence[Member]) -> list[Member]:
    """The files that a disk takes as they are named. ArchiveError for others, unless they would be passed over."""
    kept = [member for member in members if not (is_junk(member.name) and _unstorable(member.name))]
    names = {member.name for member in kept}
    folders: dict[str, str] = {}
    for member in kept:
        if why := _unstorable(member.name):
            raise ArchiveError(f"The name {member.name[:40]!r}… {why}")
        for above in PurePosixPath(member.name).parents:
            if str(above) in names:
                raise ArchiveError(f"{str(above)!r} is both a file and a folder in the zip. Rename one of them.")
        folder = member.packed_name.rpartition("/")[0]
        other = folders.setdefault(unicodedata.normalize("NFC", folder), folder)
        if other != folder:
            raise ArchiveError(
                f"The folders {other!a} and {folder!a} have the same name in two Unicode forms. Rename one of "
                "them, or put their files together."
            )
    return kept


def _unstorable(name: str) -> str | None:
    parts = name.split("/")
    if len(name.encode()) > MOST_PATH_BYTES or len(parts) > MOST_FOLDERS:
        return f"lies too deep: in {MOST_FOLDERS} folders at most, with {MOST_PATH_BYTES} bytes. Shorten it."
    if any(len(part.encode()) > MOST_NAME_BYTES for part in parts):
        return f"is too long: a file or folder takes {MOST_NAME_BYTES} bytes at most. Shorten it."
    return None


def _extract_one(member: Member, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as sink:
            for chunk in member.chunks():
                sink.write(chunk)
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in _NAME_ERRORS:
            raise
        raise ArchiveError(f"The disk cannot store a file of the name {member.name[-80:]!r}. Rename it.") from error
