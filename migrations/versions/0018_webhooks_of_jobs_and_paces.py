"""Webhooks of single jobs, by kind and of a job's progress; units say how far they are, and what does not count for
their pace.

Columns without a default, or with a constant one: no row is rewritten, and the code before this revision goes on
working. It sends events of a job to all webhooks of the tenant, so there must be no webhooks of single jobs while it
runs: they come with the new API. The indexes are built without blocking writes; see 0009.

Revision: 0018, after 0017
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_webhooks_subscribed": "INDEX {} ON webhooks (tenant_id) WHERE NOT of_jobs",
    "uq_webhooks_of_jobs": "UNIQUE INDEX {} ON webhooks (tenant_id, url, secret) WHERE of_jobs",
    "uq_deliveries_progress": "UNIQUE INDEX {} ON deliveries (webhook_id, job_id) WHERE type = 'job.progress'",
}


def upgrade() -> None:
    op.add_column("webhooks", sa.Column("kinds", ARRAY(sa.String(20)), nullable=True))
    op.add_column("webhooks", sa.Column("of_jobs", sa.Boolean(), nullable=False, server_default="false"))
    op.add_column("deliveries", sa.Column("job_id", sa.Uuid(), nullable=True))
    op.create_table(
        "job_webhooks",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("webhook_id", sa.Uuid(), nullable=False),
        sa.Column("events", ARRAY(sa.String(40)), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_job_webhooks"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE", name="fk_job_webhooks_job_id_jobs"),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], ondelete="CASCADE", name="fk_job_webhooks_webhook_id_webhooks"
        ),
    )
    op.create_index("ix_job_webhooks_webhook_id", "job_webhooks", ["webhook_id"])
    op.add_column("units", sa.Column("done", sa.Integer(), nullable=True))
    op.add_column("units", sa.Column("warmup_seconds", sa.Double(), nullable=True))
    op.add_column("units", sa.Column("expected_at", sa.DateTime(timezone=True), nullable=True))
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name, definition in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute("CREATE " + definition.format(f"CONCURRENTLY {name}"))


def downgrade() -> None:
    """Webhooks of single jobs are deleted with their deliveries."""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name in INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    for name in ("done", "warmup_seconds", "expected_at"):
        op.drop_column("units", name)
    op.drop_table("job_webhooks")
    op.execute("DELETE FROM webhooks WHERE of_jobs")
    op.drop_column("deliveries", "job_id")
    op.drop_column("webhooks", "of_jobs")
    op.drop_column("webhooks", "kinds")
