"""Stored scans: registered once for each tenant, found by id and by content hash.

Whoever sends a scan, or asks whether it is stored, is about to use it. `sent_at` says so to retention, which deletes
scans that nothing needs (jobs/retention/scans.py).
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import ScanNotFound
from jobs.tables import Scan

FRESH_SECONDS = 3600.0
"""`sent_at` is written again after this time (s), so that a scan that is sent a thousand times is not."""


def register(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert scans whose bytes are stored; the tenant's scans with the same hash stay, and count as just sent."""
    if rows:
        # In the same order everywhere, so that two requests with the same scans cannot deadlock.
        ordered = sorted(rows, key=lambda row: str(row["sha256"]))
        key = ["sha256", "tenant_id"]
        kept = insert(Scan).on_conflict_do_update(index_elements=key, set_={"sent_at": NOW}, where=_is_stale())
        session.execute(kept, ordered)


def get(session: Session, tenant_id: str, scan_id: uuid.UUID) -> Scan:
    """One scan.

    Raises:
        ScanNotFound
    """
    found = session.scalar(select(Scan).where(Scan.id == scan_id, Scan.tenant_id == tenant_id))
    if found is None:
        raise ScanNotFound
    return found


def known(session: Session, tenant_id: str, scan_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Those of the ids that are scans of the tenant. They count as just sent."""
    return set(frames(session, tenant_id, scan_ids))


def frames(session: Session, tenant_id: str, scan_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """As `known`, with the number of each scan's frames. One that was stored before they were counted has one."""
    mine = Scan.tenant_id == tenant_id, Scan.id.in_(scan_ids)
    _refresh(session, *mine)
    return {row.id: row.frames or 1 for row in session.execute(select(Scan.id, Scan.frames).where(*mine))}


def by_hash(session: Session, tenant_id: str, hashes: Sequence[str]) -> dict[str, uuid.UUID]:
    """Ids of the tenant's stored scans by content hash (SHA-256 in hex). They count as just sent."""
    mine = Scan.tenant_id == tenant_id, Scan.sha256.in_(hashes)
    _refresh(session, *mine)
    return {row.sha256: row.id for row in session.execute(select(Scan.sha256, Scan.id).where(*mine))}


def _refresh(session: Session, *which: ColumnElement[bool]) -> None:
    """Waits for a deletion that is under way: what is found afterwards stays."""
    stale = select(Scan.id).where(*which, _is_stale()).order_by(Scan.sha256).with_for_update(key_share=True)
    sent = update(Scan).where(Scan.id.in_(stale)).values(sent_at=NOW)
    session.execute(sent.execution_options(synchronize_session=False))


def _is_stale() -> ColumnElement[bool]:
    stale: ColumnElement[bool] = func.coalesce(Scan.sent_at, Scan.created_at) < NOW - seconds(FRESH_SECONDS)
    return stale
