"""Stored scans: registered once for each tenant, found by id and by content hash.

Whoever sends a scan, or asks whether it is stored, is about to use it. `sent_at` says so to retention, which deletes
scans that nothing needs (jobs/retention/scans.py).
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.db import NOW, seconds
from jobs.deletions import receipts
from jobs.errors import ScanNotFound, StillNeeded
from jobs.tables import Deletion, DeletionKind, Job, Scan, ScanResult, Truth

FRESH_SECONDS = 3600.0
"""`sent_at` is written again after this time (s), so that a scan that is sent a thousand times is not."""
_SENT: dict[str, Any] = {"sent_at": NOW, "deletion_id": None}
"""Whoever sends a scan again keeps it from going with a deleted job."""


def register(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert scans whose bytes are stored; the tenant's scans with the same hash stay, and count as just sent."""
    if rows:
        # In the same order everywhere, so that two requests with the same scans cannot deadlock.
        ordered = sorted(rows, key=lambda row: str(row["sha256"]))
        key = ["sha256", "tenant_id"]
        kept = insert(Scan).on_conflict_do_update(index_elements=key, set_=_SENT, where=_is_stale())
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


def delete(session: Session, tenant_id: str, scan_id: uuid.UUID, by_key: uuid.UUID | None = None) -> Deletion:
    """Delete a scan with all results, explanations and feedback of it. Idempotent. The same bytes may be sent again at
    once, and become another scan.

    Raises:
        ScanNotFound
        StillNeeded: a job that has not ended predicts it.
    """
    told_in = set(session.scalars(select(Truth.job_id).where(Truth.scan_id == scan_id)))
    idempotency.forget(session, tenant_id, [scan_id, *(job_id for job_id in told_in if job_id)])
    mine = Scan.id == scan_id, Scan.tenant_id == tenant_id
    # FOR UPDATE: no result or feedback may refer to it meanwhile.
    if session.scalar(select(Scan.id).where(*mine).with_for_update()) is None:
        return receipts.repeated(session, tenant_id, DeletionKind.SCAN, scan_id, ScanNotFound)
    unfinished = select(ScanResult.job_id).join(Job, Job.id == ScanResult.job_id)
    job_id = session.scalar(unfinished.where(ScanResult.scan_id == scan_id, Job.finished_at.is_(None)).limit(1))
    if job_id is not None:
        raise StillNeeded(f"Job {job_id} predicts this scan. Wait for its end, or cancel it, and then delete the scan.")
    deletion = receipts.begin(session, tenant_id, DeletionKind.SCAN, scan_id, by_key)
    hidden = {"tenant_id": receipts.hidden_tenant(deletion.id), "deletion_id": deletion.id}
    session.execute(update(Scan).where(Scan.id == scan_id).values(**hidden))
    return deletion


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
    sent = update(Scan).where(Scan.id.in_(stale)).values(**_SENT)
    session.execute(sent.execution_options(synchronize_session=False))


def _is_stale() -> ColumnElement[bool]:
    stale = func.coalesce(Scan.sent_at, Scan.created_at) < NOW - seconds(FRESH_SECONDS)
    return or_(stale, Scan.deletion_id.is_not(None))
