"""Receipts of deletions that were asked for, and of versions and datasets that retention deletes.

A short transaction moves the thing to a tenant of its own, where no request finds it, and writes a receipt. The leading
dispatcher deletes what belongs to it (`jobs.retention.deletions`). The receipt stays, as the audit line.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from jobs.errors import DeletionNotFound, NotFound
from jobs.paging import Page, page
from jobs.tables import Deletion, DeletionKind, ReleasedBlob, ReleasedRun

HIDDEN = "deleted-"
"""How the tenants of what is being deleted begin."""


@dataclass(frozen=True)
class Receipt:
    """A deletion, and what is left of it outside the database: files in the store, runs in MLflow."""

    deletion: Deletion
    files_left: int
    runs_left: int


def hidden_tenant(deletion_id: uuid.UUID) -> str:
    """The tenant that has what this deletion deletes."""
    return f"{HIDDEN}{deletion_id}"


def is_hidden(tenant: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """SQL: the row is being deleted on request."""
    return tenant.startswith(HIDDEN)


def begin(
    session: Session, tenant_id: str, kind: DeletionKind, target: object, by_key: uuid.UUID | None, **more: Any
) -> Deletion:
    """Write the receipt. What refers to blobs and is deleted in this transaction counts as its own."""
    deletion = Deletion(tenant_id=tenant_id, kind=kind, target=str(target), by_key=by_key, counts={}, **more)
    session.add(deletion)
    session.flush()
    session.refresh(deletion)
    release_for(session, deletion.id)
    return deletion


def release_for(session: Session, deletion_id: uuid.UUID) -> None:
    """From now to the end of the transaction, released blobs belong to this deletion: its receipt waits for them."""
    session.execute(select(func.set_config("renalq.deletion", str(deletion_id), True)))


def add_counts(deletion: Deletion, gone: Mapping[str, int]) -> None:
    """Add to the counts of what went. The deletion's row must be locked."""
    counts = dict(deletion.counts)
    for name, number in gone.items():
        if number:
            counts[name] = counts.get(name, 0) + number
    deletion.counts = counts


def repeated(session: Session, tenant_id: str, kind: DeletionKind, target: object, unknown: type[NotFound]) -> Deletion:
    """The receipt of an earlier request to delete the same.

    Raises:
        NotFound: `unknown`, if there was none.
    """
    same = Deletion.tenant_id == tenant_id, Deletion.kind == kind, Deletion.target == str(target)
    found = session.scalar(select(Deletion).where(*same))
    if found is None:
        raise unknown
    return found


def get(session: Session, tenant_id: str, deletion_id: uuid.UUID) -> Receipt:
    """One receipt.

    Raises:
        DeletionNotFound
    """
    mine = select(Deletion).where(Deletion.id == deletion_id, Deletion.tenant_id == tenant_id)
    found = session.scalar(mine)
    if found is None:
        raise DeletionNotFound
    return receipt(session, found)


def receipt(session: Session, deletion: Deletion) -> Receipt:
    """The deletion with what is left of it now."""
    if deletion.finished_at is not None:
        return Receipt(deletion, 0, 0)
    left = (
        session.scalar(select(func.count()).select_from(table).where(table.deletion_id == deletion.id)) or 0
        for table in (ReleasedBlob, ReleasedRun)
    )
    return Receipt(deletion, *left)


def list_receipts(session: Session, tenant_id: str, limit: int, after: uuid.UUID | None) -> Page[Receipt]:
    """The tenant's receipts, newest first."""
    mine = select(Deletion).where(Deletion.tenant_id == tenant_id)
    if after is not None:
        mine = mine.where(Deletion.id < after)
    rows = session.scalars(mine.order_by(Deletion.id.desc()).limit(limit + 1)).all()
    return page([receipt(session, row) for row in rows], limit, lambda each: each.deletion.id)
