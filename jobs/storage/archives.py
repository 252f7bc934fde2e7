"""Uploaded zips: `ml.spec.zips` with the limits of the settings and this package's exception."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from jobs.errors import BadArchive
from jobs.settings import Settings
from ml.spec import zips
from ml.spec.zips import Member, Members, is_zip

__all__ = ["Limits", "Member", "Members", "count_members", "is_zip", "open_zip"]


@dataclass(frozen=True)
class Limits(zips.Limits):
    """Limits of an uploaded zip."""

    members: int = 100_000
    member_bytes: int = 512 * 2**20

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """The limits in the settings."""
        return cls(
            members=settings.max_archive_members,
            total_bytes=settings.max_archive_bytes,
            ratio=settings.max_archive_ratio,
            member_bytes=settings.max_scan_bytes,
        )


@contextmanager
def open_zip(stream: IO[bytes], limits: zips.Limits, may_be_empty: bool = False) -> Iterator[Members]:
    """The files of a checked zip, readable inside the `with` block; without those that are passed over by their names.

    Raises:
        BadArchive: not a zip, damaged, or with a refused member, which the message names.
    """
    with zips.open_zip(stream, limits, BadArchive, may_be_empty) as members:
        yield members


def count_members(stream: IO[bytes], limits: zips.Limits, may_be_empty: bool = False) -> int:
    """Check a zip's structure and return its number of files. Raises as `open_zip`."""
    with open_zip(stream, limits, may_be_empty) as members:
        return len(members)
