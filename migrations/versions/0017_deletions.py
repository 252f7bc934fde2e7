"""Deletions on request: their receipts, what waits for them, and indexes to find what belongs to a deleted thing.

Nullable columns and a new function of an old trigger: the code before this revision goes on working. It does not know
of deletions, and the leader of this release carries them out. The histories of promotions and operating points outlive
deleted versions, so their foreign keys go. The indexes are built without blocking writes; see 0009.

Revision: 0017, after 0016
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

RELEASE_BLOBS = """
CREATE OR REPLACE FUNCTION release_blobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('INSERT INTO released_blobs (sha256{column}) SELECT DISTINCT %1$I{value} FROM deleted ORDER BY 1
        ON CONFLICT (sha256) DO UPDATE SET aside = false, due_at = clock_timestamp(){update}', TG_ARGV[0]);
    RETURN NULL;
END $$
"""
FOR_A_RECEIPT = {
    "column": ", deletion_id",
    "value": ", nullif(current_setting(''renalq.deletion'', true), '''')::uuid",
    "update": ", deletion_id = coalesce(excluded.deletion_id, released_blobs.deletion_id)",
}
KEEP = """
-- What was deleted for whom stays as it was written.
CREATE FUNCTION deletions_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'deletion % is history: it is neither changed nor deleted', OLD.id
        USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER deletions_are_kept BEFORE DELETE ON deletions FOR EACH ROW EXECUTE FUNCTION deletions_are_kept();
CREATE TRIGGER finished_deletions_are_kept BEFORE UPDATE ON deletions FOR EACH ROW
    WHEN (OLD.finished_at IS NOT NULL) EXECUTE FUNCTION deletions_are_kept();
"""
END_ONCE = """
CREATE OR REPLACE TRIGGER scan_results_end_once BEFORE UPDATE ON scan_results
    FOR EACH ROW WHEN (OLD.state <> 'pending'{but}) EXECUTE FUNCTION scan_results_end_once();
"""
# A result ends once, and may be cleared when its scan is deleted.
BUT_CLEARED = """ AND (NEW.error ->> 'code' IS DISTINCT FROM 'SCAN_DELETED'
    OR NEW.state <> OLD.state OR NEW.finished_at <> OLD.finished_at
    OR num_nonnulls(NEW.scan_id, NEW.label, NEW.probabilities, NEW.name, NEW.custom_id, NEW.source_url) > 0)"""
HISTORIES = ("promotions", "operating_point_changes")
INDEXES = {
    "ix_scans_deletion_id": "ON scans (deletion_id) WHERE deletion_id IS NOT NULL",
    "ix_released_blobs_deletion_id": "ON released_blobs (deletion_id)",
    "ix_idempotency_keys_location": (
        "ON idempotency_keys (\"right\"((headers ->> 'Location'), 36)) WHERE headers ? 'Location'"
    ),
    "ix_idempotency_keys_made_id": "ON idempotency_keys (made_id) WHERE made_id IS NOT NULL",
    "ix_deliveries_job_id": "ON deliveries ((data ->> 'job_id')) WHERE data ? 'job_id'",
}


def upgrade() -> None:
    _create_tables()
    op.add_column("scans", sa.Column("deletion_id", sa.Uuid(), nullable=True))
    op.add_column("released_blobs", sa.Column("deletion_id", sa.Uuid(), nullable=True))
    op.execute(RELEASE_BLOBS.format(**FOR_A_RECEIPT))
    op.execute(KEEP)
    op.execute(END_ONCE.format(but=BUT_CLEARED))
    for table in HISTORIES:
        op.drop_constraint(f"fk_{table}_model_id_model_versions", table)
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name, definition in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} {definition}")


def downgrade() -> None:
    """Deletions that are under way end where they stand. The histories of deleted versions keep their foreign keys
    from being checked: they hold for new rows only."""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name in INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    for table in HISTORIES:
        op.execute(
            f"ALTER TABLE {table} ADD CONSTRAINT fk_{table}_model_id_model_versions "
            "FOREIGN KEY (model_id) REFERENCES model_versions (id) NOT VALID"
        )
    op.execute(RELEASE_BLOBS.format(column="", value="", update=""))
    op.execute(END_ONCE.format(but=""))
    op.drop_column("released_blobs", "deletion_id")
    op.drop_column("scans", "deletion_id")
    op.drop_table("released_runs")
    op.drop_table("deletions")
    op.execute("DROP FUNCTION deletions_are_kept()")


def _create_tables() -> None:
    now = sa.text("clock_timestamp()")
    op.create_table(
        "deletions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("target", sa.String(length=40), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=True),
        sa.Column("with_scans", sa.Boolean(), server_default="true", nullable=False),
        sa.Column("counts", postgresql.JSONB(), server_default="{}", nullable=False),
        sa.Column("by_key", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('dataset', 'job', 'model', 'scan')", name=op.f("ck_deletions_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deletions")),
    )
    op.create_index("uq_deletions_tenant_id_kind_target", "deletions", ["tenant_id", "kind", "target"], unique=True)
    op.create_index("ix_deletions_tenant_id_id", "deletions", ["tenant_id", "id"])
    unfinished = sa.text("finished_at IS NULL")
    op.create_index("ix_deletions_unfinished", "deletions", ["due_at"], postgresql_where=unfinished)
    op.create_table(
        "released_runs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("deletion_id", sa.Uuid(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_released_runs")),
    )
    op.create_index(op.f("ix_released_runs_deletion_id"), "released_runs", ["deletion_id"])
    op.create_index(op.f("ix_released_runs_due_at"), "released_runs", ["due_at"])
