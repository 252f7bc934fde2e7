"""Retention of stored scans that nothing needs any more: no result, no feedback, and nobody has sent them lately.

Each step looks at the next scans in the order of their ids, from where the last step ended: those that are kept are
passed once a round, not once a step.
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.retention.batches import ROWS, id_bound, older_than
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from jobs.tables import Scan, ScanResult, Truth

START = uuid.UUID(int=0)


class ScanSweep:
    """One round over the scans after another."""

    def __init__(self) -> None:
        self._after = START

    def step(self, sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
        """Look at a batch of scans by RENALQ_SCAN_DAYS. True: this round has more."""
        if not settings.scan_days:
            return False
        with sessions.begin() as session:
            seen = _next_scans(session, self._after, settings.scan_days)
            delete_unneeded(session, seen, settings.scan_days)
        more = len(seen) == ROWS
        self._after = seen[-1] if more else START
        return more


def delete_unneeded(session: Session, scan_ids: Sequence[uuid.UUID], days: float) -> int:
    """Delete those of the scans that nothing refers to and that were not sent for `days`. Locked ones are skipped.
    Returns how many were deleted."""
    return delete_unreferred(session, scan_ids, older_than(func.coalesce(Scan.sent_at, Scan.created_at), days))


def delete_unreferred(session: Session, scan_ids: Sequence[uuid.UUID], which: ColumnElement[bool]) -> int:
    """As `delete_unneeded`, of scans for which `which` holds."""
    unneeded = and_(which, ~is_referred())
    locked = select(Scan.id).where(Scan.id.in_(scan_ids), unneeded).with_for_update(of=Scan, skip_locked=True)
    free = session.scalars(locked).all()
    # A job may have been submitted after that statement began. While the lock is held, its foreign key waits.
    gone = delete(Scan).where(Scan.id.in_(free), unneeded).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def is_referred() -> ColumnElement[bool]:
    """SQL: a result or feedback refers to the scan."""
    return or_(*(exists().where(column == Scan.id) for column in (ScanResult.scan_id, Truth.scan_id)))


def _next_scans(session: Session, after: uuid.UUID, days: float) -> Sequence[uuid.UUID]:
    bound = id_bound(session, days)
    scans = select(Scan.id).where(Scan.id > after, Scan.id < bound).order_by(Scan.id).limit(ROWS)
    return session.scalars(scans).all()
