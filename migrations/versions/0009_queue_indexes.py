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
    "ix_units_claimable": (
        "ON units (lane, tenant_id, (explains IS NOT NULL), job_id, ordinal) WHERE state IN ('queued', 'dispatched')"
    ),
    "ix_units_scheduled": "ON units (not_before) WHERE state = 'scheduled'",
    "ix_units_running": "ON units (id) WHERE state = 'running'",
    "ix_jobs_cancelling": "ON jobs (id) WHERE cancel_requested_at IS NOT NULL AND finished_at IS NULL",
    # -- retention --
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
    "ix_deliveries_due": "ON deliveries (webhook_id, next_at) WHERE state = 'pending'",
    "ix_deliveries_webhook_id_id": "ON deliveries (webhook_id, id)",
    "ix_jobs_not_succeeded": "ON jobs (tenant_id, state, id) WHERE state <> 'succeeded'",
    "ix_jobs_not_predict": "ON jobs (tenant_id, kind, id) WHERE kind <> 'predict'",
}
OLD: dict[str, str] = {
    # indexes of earlier revisions that nothing needs any more, as they were
    # -- life of a unit --
    "ix_units_leased": "ON units (lease_expires_at) WHERE state = 'running'",
    # -- retention --
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
    "ix_deliveries_pending": "ON deliveries (next_at) WHERE state = 'pending'",
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
