"""Deletion of blobs that no row refers to any more.

Triggers list the blobs of deleted rows in `released_blobs`. A blob on the list without a referring row is set aside in
the store, where it can still be read, and deleted after an hour. Why not at once: a process that stores the same bytes
finds them stored already, and commits its row a little later. If such a row is there when the hour is over, the blob is
put back. Whoever stores the bytes after they were set aside stores them anew. So no lock is held while the store is
asked, and no row ever refers to missing bytes.
"""

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import structlog
from sqlalchemy import Select, delete, exists, func, literal, select, tuple_, union, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.types import String

from jobs.db import NOW, Sessions, seconds
from jobs.deletions import receipts
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Dataset, Deletion, ModelVersion, ReleasedBlob, Scan

log = structlog.get_logger()

REFERENCES: Sequence[InstrumentedAttribute[str]] = (
    Scan.sha256,
    Artifact.sha256,
    Dataset.archive_sha256,
    ModelVersion.weights_sha256,
)
"""Every column whose value keeps a blob. Each of these tables has the trigger `released_blobs`."""
GRACE_SECONDS = 3600.0
"""Longer than any process takes from storing bytes to committing the row that refers to them (s): minutes at most. The
default of RENALQ_DELETION_GRACE_SECONDS; a blob that could not be deleted is tried again so much later."""
BLOBS = 200
"""Blobs in one step."""
THREADS = 8
"""A store over the network answers many requests at once."""


class Action(Enum):
    """What is done with a blob of the list."""

    KEEP = "a row refers to it"
    SET_ASIDE = "no row refers to it"
    PUT_BACK = "set aside, and a row refers to it"
    DELETE = "set aside, and no row refers to it"


@dataclass(frozen=True)
class Planned:
    """A row of the list, as it was when the action was decided."""

    sha256: str
    due_at: dt.datetime
    action: Action
    deletion_id: uuid.UUID | None = None


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Do the next thing with a batch of released blobs. True: there are more."""
    with sessions.begin() as session:
        planned = plan(session)
    if planned:
        with ThreadPoolExecutor(THREADS) as pool:
            done = list(pool.map(lambda one: _succeeds(store, one), planned))
        with sessions.begin() as session:
            grace = settings.deletion_grace_seconds
            record(session, [one for one, good in zip(planned, done, strict=True) if good], grace)
            _postpone(session, [one for one, good in zip(planned, done, strict=True) if not good])
    return len(planned) == BLOBS


def referenced(session: Session, hashes: Sequence[str]) -> set[str]:
    """Those of the blobs that a row refers to."""
    listed = func.unnest(literal(hashes, ARRAY(String))).column_valued("listed")
    return set(session.scalars(union(*(select(listed).where(exists().where(ref == listed)) for ref in REFERENCES))))


def plan(session: Session) -> list[Planned]:
    """What is to be done with the blobs that are due, those that have waited longest first."""
    due = select(ReleasedBlob).where(ReleasedBlob.due_at <= func.now()).order_by(ReleasedBlob.due_at).limit(BLOBS)
    rows = session.scalars(due).all()
    kept = referenced(session, [row.sha256 for row in rows])
    return [_planned(row, row.sha256 in kept) for row in rows]


def _planned(row: ReleasedBlob, kept: bool) -> Planned:
    return Planned(row.sha256, row.due_at, _action(row.aside, kept), row.deletion_id)


def _action(aside: bool, kept: bool) -> Action:
    if aside:
        return Action.PUT_BACK if kept else Action.DELETE
    return Action.KEEP if kept else Action.SET_ASIDE


def carry_out(store: BlobStore, one: Planned) -> None:
    """Do it in the store. Doing it twice does no harm."""
    match one.action:
        case Action.SET_ASIDE:
            store.set_aside(one.sha256)
        case Action.PUT_BACK:
            store.put_back(one.sha256)
        case Action.DELETE:
            store.delete_aside(one.sha256)


def _succeeds(store: BlobStore, one: Planned) -> bool:
    try:
        carry_out(store, one)
    except Exception as error:  # whatever a store over the network raises: the other blobs must not wait for it
        log.warning("blob_not_deleted", sha256=one.sha256[:12], error=type(error).__name__)
        return False
    return True


def record(session: Session, done: Sequence[Planned], grace: float = GRACE_SECONDS) -> None:
    """Note what was done, but for blobs that were released again meanwhile.

    Args:
        grace: how long a blob is set aside (s).
    """
    aside = [one for one in done if one.action == Action.SET_ASIDE]
    finished = [one for one in done if one.action != Action.SET_ASIDE]
    gone = delete(ReleasedBlob).where(ReleasedBlob.sha256.in_(_unchanged(finished))).returning(ReleasedBlob.sha256)
    recorded = set(session.scalars(gone.execution_options(synchronize_session=False)))
    session.execute(_later(aside, grace).values(aside=True))
    _count(session, [one for one in finished if one.sha256 in recorded])


def _count(session: Session, finished: Iterable[Planned]) -> None:
    """Note in the receipts how many files went, and how many are needed by others. In the order of their ids."""
    counts: dict[uuid.UUID, Counter[str]] = {}
    for one in finished:
        if one.deletion_id is not None:
            name = "files" if one.action == Action.DELETE else "files_kept"
            counts.setdefault(one.deletion_id, Counter())[name] += 1
    for deletion_id in sorted(counts):
        if (deletion := session.get(Deletion, deletion_id, with_for_update=True)) is not None:
            receipts.add_counts(deletion, counts[deletion_id])


def _postpone(session: Session, failed: Sequence[Planned]) -> None:
    session.execute(_later(failed, GRACE_SECONDS))


def _later(rows: Iterable[Planned], wait: float):  # type: ignore[no-untyped-def]
    unchanged = ReleasedBlob.sha256.in_(_unchanged(rows))
    return update(ReleasedBlob).where(unchanged).values(due_at=NOW + seconds(wait))


def _unchanged(rows: Iterable[Planned]) -> Select[str]:
    """Those that nobody has released again. One that is locked is being released right now."""
    same = tuple_(ReleasedBlob.sha256, ReleasedBlob.due_at).in_([(row.sha256, row.due_at) for row in rows])
    return select(ReleasedBlob.sha256).where(same).with_for_update(skip_locked=True)
