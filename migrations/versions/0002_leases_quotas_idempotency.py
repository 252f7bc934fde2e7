"""Nothing is lost: checkpoints, quotas, idempotency keys, retries, fair lanes.

Revision: 0002, after 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BACKFILL = """
-- What is in the queue now counts against its tenant's quota.
INSERT INTO tenant_loads (tenant_id, scans, batches)
    SELECT tenant_id, sum(total), count(*) FILTER (WHERE kind = 'predict_batch')
    FROM jobs WHERE finished_at IS NULL GROUP BY tenant_id;
UPDATE units SET scans = found.scans
    FROM (SELECT unit_id, count(*) AS scans FROM scan_results GROUP BY unit_id) AS found
    WHERE units.id = found.unit_id AND units.finished_at IS NULL;
-- What ended before has told MLflow all that it will.
UPDATE jobs SET tracked_at = finished_at WHERE finished_at IS NOT NULL;
"""

TRIGGER = """
-- A scan has one result: what has ended stays as it ended.
CREATE FUNCTION scan_results_end_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'scan % of job % has ended as %', OLD.ordinal, OLD.job_id, OLD.state
        USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER scan_results_end_once BEFORE UPDATE ON scan_results
    FOR EACH ROW WHEN (OLD.state <> 'pending') EXECUTE FUNCTION scan_results_end_once();
"""


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("locked_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "key_sha256", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"], unique=False)
    op.create_table(
        "tenant_loads",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("scans", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("batches", sa.Integer(), server_default="0", nullable=False),
        sa.CheckConstraint("scans >= 0 AND batches >= 0", name=op.f("ck_tenant_loads_counts")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_tenant_loads")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
    )
    op.create_index("ix_checkpoints_job_id", "checkpoints", ["job_id"], unique=False)
    op.add_column("jobs", sa.Column("tracked_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("idempotency_key", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("retry_of", sa.Uuid(), nullable=True))
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["lane", "tenant_id", "id"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_index(
        "ix_jobs_untracked",
        "jobs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("kind = 'train' AND tracked_at IS NULL"),
    )
    op.create_index(
        "uq_jobs_retry_of", "jobs", ["retry_of"], unique=True, postgresql_where=sa.text("retry_of IS NOT NULL")
    )
    op.create_index(
        "uq_jobs_tenant_id_idempotency_key",
        "jobs",
        ["tenant_id", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_foreign_key(op.f("fk_jobs_retry_of_jobs"), "jobs", "jobs", ["retry_of"], ["id"], ondelete="SET NULL")
    op.add_column("units", sa.Column("scans", sa.Integer(), server_default="1", nullable=False))
    op.add_column("units", sa.Column("yield_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.drop_index("ix_units_waiting", table_name="units")
    op.create_index("ix_units_rung", "units", ["lane"], unique=False, postgresql_where=sa.text("state = 'dispatched'"))
    op.create_index(
        "ix_units_succeeded",
        "units",
        ["lane", "finished_at"],
        unique=False,
        postgresql_where=sa.text("state = 'succeeded'"),
    )
    op.create_index(
        "ix_units_unfinished",
        "units",
        ["job_id", "ordinal"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.execute(BACKFILL)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER scan_results_end_once ON scan_results")
    op.execute("DROP FUNCTION scan_results_end_once()")
    op.drop_index("ix_units_unfinished", table_name="units", postgresql_where=sa.text("finished_at IS NULL"))
    op.drop_index("ix_units_succeeded", table_name="units", postgresql_where=sa.text("state = 'succeeded'"))
    op.drop_index("ix_units_rung", table_name="units", postgresql_where=sa.text("state = 'dispatched'"))
    op.create_index(
        op.f("ix_units_waiting"),
        "units",
        ["lane", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('queued', 'dispatched')"),
    )
    op.drop_column("units", "yield_requested_at")
    op.drop_column("units", "scans")
    op.drop_constraint(op.f("fk_jobs_retry_of_jobs"), "jobs", type_="foreignkey")
    op.drop_index(
        "uq_jobs_tenant_id_idempotency_key", table_name="jobs", postgresql_where=sa.text("idempotency_key IS NOT NULL")
    )
    op.drop_index("uq_jobs_retry_of", table_name="jobs", postgresql_where=sa.text("retry_of IS NOT NULL"))
    op.drop_index(
        "ix_jobs_untracked", table_name="jobs", postgresql_where=sa.text("kind = 'train' AND tracked_at IS NULL")
    )
    op.drop_index("ix_jobs_unfinished", table_name="jobs", postgresql_where=sa.text("finished_at IS NULL"))
    op.drop_column("jobs", "retry_of")
    op.drop_column("jobs", "idempotency_key")
    op.drop_column("jobs", "tracked_at")
    op.drop_index("ix_checkpoints_job_id", table_name="checkpoints")
    op.drop_table("checkpoints")
    op.drop_table("tenant_loads")
    op.drop_index("ix_idempotency_keys_created_at", table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
