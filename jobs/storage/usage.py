"""How many bytes a tenant stores: scans, datasets and open uploads (with their declared size).

Triggers keep account of it (`StorageChange`). Equal bytes of two tenants are stored once and count for both.
"""

from dataclasses import dataclass

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from jobs.tables import StorageChange

FOLD_ROWS = 500
"""Changes of a tenant that are read before they are folded into one for each kind."""


@dataclass(frozen=True)
class StorageUsage:
    """What a tenant stores (bytes)."""

    scans: int = 0
    datasets: int = 0
    uploads: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.scans + self.datasets + self.uploads


def usage(session: Session, tenant_id: str) -> StorageUsage:
    """What the tenant stores, as this transaction sees it."""
    mine = select(StorageChange.kind, func.sum(StorageChange.bytes), func.count())
    rows = session.execute(mine.where(StorageChange.tenant_id == tenant_id).group_by(StorageChange.kind)).all()
    if sum(changes for _, _, changes in rows) > FOLD_ROWS:
        session.execute(FOLD, {"tenant": tenant_id})
    return StorageUsage(**{kind: int(stored) for kind, stored, _ in rows})


def usage_of_all(session: Session) -> dict[str, int]:
    """What all tenants store together, by kind."""
    rows = session.execute(select(StorageChange.kind, func.sum(StorageChange.bytes)).group_by(StorageChange.kind))
    return {kind: int(stored) for kind, stored in rows}


# Two that fold at the same time fold different rows; whoever reads meanwhile sees the rows before or after.
FOLD = text("""
WITH folded AS (
    DELETE FROM storage_changes WHERE id IN (
        SELECT id FROM storage_changes WHERE tenant_id = :tenant ORDER BY id LIMIT 10000 FOR UPDATE SKIP LOCKED
    ) RETURNING kind, bytes
)
INSERT INTO storage_changes (tenant_id, kind, bytes) SELECT :tenant, kind, sum(bytes) FROM folded GROUP BY kind
""")
