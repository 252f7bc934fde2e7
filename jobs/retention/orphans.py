"""Orphans: blobs without a row, left by processes that died between storing bytes and committing their row.

A round lists the whole store, some folders at each step and outside any transaction, and puts each blob without a row
on the list of released blobs, due in RENALQ_ORPHAN_DAYS. By then a row that was not committed yet is there.
"""

import random
import re
from collections.abc import Iterator

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import Sessions, seconds
from jobs.retention.batches import DAY_SECONDS
from jobs.retention.blobs import referenced
from jobs.settings import Settings
from jobs.storage.blobs import ASIDE, BlobStore
from jobs.tables import ReleasedBlob

FOLDERS, BLOBS = 100, 2000
"""Folders, and about as many blobs, in one step."""
_HASH = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9a-f]{2}")


class OrphanSweep:
    """One round over the store after another."""

    def __init__(self) -> None:
        self._round: Iterator[str] | None = None

    def step(self, sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
        """Look at some folders of the store. True: this round has more."""
        if not settings.orphan_days:
            return False
        if self._round is None:
            store.remove_partial(DAY_SECONDS)
            self._round = _folders(store)
        stored, ended = _next_blobs(store, self._round)
        if stored:
            with sessions.begin() as session:
                list_orphans(session, stored, settings.orphan_days)
        if ended:
            self._round = None
        return not ended


def list_orphans(session: Session, stored: dict[str, bool], days: float) -> None:
    """Put the blobs without a row on the list. `stored`: whether each was set aside already, and its row is lost."""
    orphans = stored.keys() - referenced(session, list(stored))
    due_at = func.now() + seconds(days * DAY_SECONDS)
    rows = [{"sha256": name, "aside": stored[name], "due_at": due_at} for name in sorted(orphans)]
    if rows:
        session.execute(insert(ReleasedBlob).values(rows).on_conflict_do_nothing())


def _next_blobs(store: BlobStore, folders: Iterator[str]) -> tuple[dict[str, bool], bool]:
    """The next blobs, and whether the round has ended."""
    stored: dict[str, bool] = {}
    for _ in range(FOLDERS):
        folder = next(folders, None)
        if folder is None:
            return stored, True
        stored |= {name: folder.startswith(ASIDE) for name in store.entries(folder) if _HASH.fullmatch(name)}
        if len(stored) >= BLOBS:
            break
    return stored, False


def _folders(store: BlobStore) -> Iterator[str]:
    """The folders of blobs, in random order: a round that a restart cut off must not leave the same ones out again."""
    tops = [f"{above}{name}" for above in ("", f"{ASIDE}/") for name in store.entries(above) if _DIGITS.fullmatch(name)]
    random.shuffle(tops)
    for top in tops:
        yield from (f"{top}/{name}" for name in store.entries(top))
