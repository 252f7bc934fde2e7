"""Keys expire and are rotated; workers say their device; running totals for metrics and for the storage quota.

Columns without a default: no row is rewritten. The code before this revision goes on working: triggers keep account of
what it stores, too; only jobs that it ends are not in `job_counts`. While the account is opened, scans, datasets and
uploads can be read but not written: about a second for two million scans.

Revision: 0016, after 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

COUNTERS = {"fillfactor": 50}
STORED = {"scans": "size", "datasets": "archive_bytes", "uploads": "size"}
"""The column with the size (bytes) of each table's rows."""

NOTE = """
CREATE FUNCTION note_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO storage_changes (tenant_id, kind, bytes)
    SELECT tenant_id, '{table}', CASE TG_OP WHEN 'INSERT' THEN sum({size}) ELSE -sum({size}) END
    FROM changed GROUP BY tenant_id;
    RETURN NULL;
END $$
"""
TRIGGERS = """
CREATE TRIGGER {table}_added AFTER INSERT ON {table} REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION note_{table}();
CREATE TRIGGER {table}_removed AFTER DELETE ON {table} REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION note_{table}();
INSERT INTO storage_changes (tenant_id, kind, bytes)
    SELECT tenant_id, '{table}', sum({size}) FROM {table} GROUP BY tenant_id
"""


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("replaces", sa.Uuid(), nullable=True))
    op.add_column("processes", sa.Column("device", sa.String(100), nullable=True))
    _totals()
    op.create_table(
        "storage_changes",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_storage_changes"),
    )
    op.create_index("ix_storage_changes_tenant_id", "storage_changes", ["tenant_id"])
    for table, size in STORED.items():
        op.execute(NOTE.format(table=table, size=size))
        op.execute(TRIGGERS.format(table=table, size=size))


def _totals() -> None:
    op.create_table(
        "job_counts",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("bucket", sa.Integer(), nullable=False, autoincrement=False),
        *map(_total, ("jobs", "succeeded", "failed", "cancelled")),
        *map(_seconds, ("queue_seconds", "run_seconds")),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "state", "bucket", name="pk_job_counts"),
        postgresql_with=COUNTERS,
    )
    op.create_table(
        "unit_counts",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("code", sa.String(80), nullable=False),
        *map(_total, ("retried", "ended")),
        sa.PrimaryKeyConstraint("tenant_id", "kind", "code", name="pk_unit_counts"),
        postgresql_with=COUNTERS,
    )
    op.create_table(
        "request_counts",
        sa.Column("method", sa.String(10), nullable=False),
        sa.Column("route", sa.String(200), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("bucket", sa.Integer(), nullable=False, autoincrement=False),
        _total("requests"),
        _seconds("seconds"),
        sa.PrimaryKeyConstraint("method", "route", "status", "bucket", name="pk_request_counts"),
        postgresql_with=COUNTERS,
    )


def _total(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")


def _seconds(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=False, server_default="0")


def downgrade() -> None:
    """The totals so far are lost."""
    for table in STORED:
        op.execute(f"DROP TRIGGER {table}_added ON {table}")
        op.execute(f"DROP TRIGGER {table}_removed ON {table}")
        op.execute(f"DROP FUNCTION note_{table}()")
    for table in ("storage_changes", "request_counts", "unit_counts", "job_counts"):
        op.drop_table(table)
    op.drop_column("processes", "device")
    for column in ("replaces", "last_used_at", "expires_at"):
        op.drop_column("api_keys", column)
