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
    "uq_scans_sha256_tenant_id": "ON scans (sha256, tenant_id)",
    "ix_scan_results_scan_id_cached": "ON scan_results (scan_id, cached)",
    "ix_artifacts_sha256": "ON artifacts USING hash (sha256)",
    "ix_jobs_deletable": (
        "ON jobs (finished_at) WHERE finished_at IS NOT NULL "
        "AND (kind NOT IN ('predict', 'predict_batch') OR results_expired_at IS NOT NULL)"
    ),
    "ix_truths_scan_id": "ON truths (scan_id)",
    "ix_truths_job_id": "ON truths (job_id)",
    "ix_model_evaluations_job_id": "ON model_evaluations (job_id)",
    # -- dispatcher and workers --
    "ix_units_dispatched": "ON units (lane, dispatched_at) WHERE state = 'dispatched'",
    # -- webhooks, MLflow --
    "ix_deliveries_due": "ON deliveries (webhook_id, next_at) WHERE state = 'pending'",
    "ix_deliveries_webhook_id_id": "ON deliveries (webhook_id, id)",
    "ix_jobs_not_succeeded": "ON jobs (tenant_id, state, id) WHERE state <> 'succeeded'",
    "ix_jobs_not_predict": "ON jobs (tenant_id, kind, id) WHERE kind <> 'predict'",
    "ix_jobs_not_image": "ON jobs (tenant_id, pipeline, id) WHERE pipeline <> 'image'",
}
OLD: dict[str, str] = {
    # indexes of earlier revisions that nothing needs any more, as they were
    # -- life of a unit --
    "ix_units_leased": "ON units (lease_expires_at) WHERE state = 'running'",
    # -- retention --
    "uq_scans_tenant_id_sha256": "ON scans (tenant_id, sha256)",
    "ix_scan_results_computed": "ON scan_results (scan_id) WHERE state = 'succeeded' AND NOT cached",
    # -- dispatcher and workers --
    "ix_units_rung": "ON units (lane) WHERE state = 'dispatched'",
    # -- webhooks, MLflow --
    "ix_deliveries_pending": "ON deliveries (next_at) WHERE state = 'pending'",
}


def upgrade() -> None:
    _replace(OLD, NEW)


def downgrade() -> None:
    _replace(NEW, OLD)


def _replace(old: dict[str, str], new: dict[str, str]) -> None:
    with op.get_context().autocommit_block():
        # A build waits for all older transactions, such as a backup's, and blocks no writer meanwhile.
        op.execute("SET lock_timeout = 0")
        for name, definition in new.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            unique = "UNIQUE " if name.startswith("uq_") else ""
            op.execute(f"CREATE {unique}INDEX CONCURRENTLY {name} {definition}")
        for name in old:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
