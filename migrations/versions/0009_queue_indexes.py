"""Indexes of the queue's core, built without blocking writes (CONCURRENTLY, outside a transaction).

An interrupted build leaves an invalid index: `IF NOT EXISTS` would keep it, so each build first drops what is left.

Revision: 0009, after 0008
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NEW: dict[str, str] = {
    # name: what follows CREATE INDEX CONCURRENTLY name
    # -- life of a unit --
    # -- retention --
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
}
OLD: dict[str, str] = {
    # indexes of earlier revisions that nothing needs any more, as they were
    # -- life of a unit --
    # -- retention --
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
}


def upgrade() -> None:
    _replace(OLD, NEW)


def downgrade() -> None:
    _replace(NEW, OLD)


def _replace(old: dict[str, str], new: dict[str, str]) -> None:
    with op.get_context().autocommit_block():
        for name, definition in new.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} {definition}")
        for name in old:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
