"""The queue's core: units that wait for a time, revisions that move only when something shown changes, storage settings
of the hot tables.

The code before this revision goes on working while both run.

Revision: 0008, after 0007
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NOT_SHOWN = (
    "tenant_id", "lane", "revision", "source_url", "model_id", "base_model_id", "promote", "tracked_at",
    "tracking_attempts", "track_after", "idempotency_key", "created_by",
)  # fmt: skip
HOT_TABLE = (
    "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, "
    "autovacuum_analyze_scale_factor = 0.02"
)
STORAGE = {
    "jobs": HOT_TABLE,
    "units": HOT_TABLE,
    **dict.fromkeys(
        ("scan_results", "scans", "job_events", "artifacts"),
        "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 10000",
    ),
    "tenant_loads": "fillfactor = 50",
    "prediction_counts": "fillfactor = 50",
    "processes": "fillfactor = 50",
}

UNIT_STATES = ["cancelled", "dispatched", "failed", "queued", "running", "succeeded"]
UNIT_MOVES = [
    "queued>dispatched", "queued>running", "queued>cancelled",
    "dispatched>queued", "dispatched>running", "dispatched>cancelled",
    "running>queued", "running>succeeded", "running>failed", "running>cancelled",
]  # fmt: skip
SCHEDULED_MOVES = ["dispatched>scheduled", "running>scheduled", "scheduled>queued", "scheduled>cancelled"]
MOVE_LEGALLY = """
CREATE OR REPLACE FUNCTION units_move_legally() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state IN ('succeeded', 'failed', 'cancelled') THEN
        RAISE EXCEPTION 'unit % has ended as %', OLD.id, OLD.state USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.state <> OLD.state AND NOT (OLD.state || '>' || NEW.state = ANY (ARRAY[{moves}])) THEN
        RAISE EXCEPTION 'unit % may not go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$
"""
COUNT_CHANGES = """
CREATE OR REPLACE FUNCTION jobs_move_legally() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    shown jobs := NEW;
BEGIN
    IF OLD.finished_at IS NOT NULL AND (NEW.state <> OLD.state OR NEW.finished_at IS DISTINCT FROM OLD.finished_at) THEN
        RAISE EXCEPTION 'job % has ended as %', OLD.id, OLD.state USING ERRCODE = 'check_violation';
    END IF;
    {hide}
    NEW.revision := OLD.revision + (shown IS DISTINCT FROM OLD)::int;
    RETURN NEW;
END $$
"""
COUNT_UPDATES = """
CREATE OR REPLACE FUNCTION jobs_move_legally() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.finished_at IS NOT NULL AND (NEW.state <> OLD.state OR NEW.finished_at IS DISTINCT FROM OLD.finished_at) THEN
        RAISE EXCEPTION 'job % has ended as %', OLD.id, OLD.state USING ERRCODE = 'check_violation';
    END IF;
    NEW.revision := OLD.revision + 1;
    RETURN NEW;
END $$
"""
NOTIFY_CHANGES = """
DROP TRIGGER jobs_tell ON jobs;
CREATE TRIGGER jobs_tell AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_tell();
CREATE TRIGGER jobs_tell_change AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.revision <> OLD.revision) EXECUTE FUNCTION jobs_tell()
"""
NOTIFY_UPDATES = """
DROP TRIGGER jobs_tell_change ON jobs;
DROP TRIGGER jobs_tell ON jobs;
CREATE TRIGGER jobs_tell AFTER INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_tell()
"""
BLOBS_OF = {
    "scans": "sha256", "artifacts": "sha256", "datasets": "archive_sha256", "model_versions": "weights_sha256",
}  # fmt: skip
RELEASE_BLOBS = """
-- Whoever deletes rows that refer to blobs puts these on the list of blobs that may be deleted. In the order of their
-- hashes, so that two transactions that list the same ones do not wait for each other.
CREATE FUNCTION release_blobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('INSERT INTO released_blobs (sha256) SELECT DISTINCT %1$I FROM deleted ORDER BY 1
        ON CONFLICT (sha256) DO UPDATE SET aside = false, due_at = clock_timestamp()', TG_ARGV[0]);
    RETURN NULL;
END $$
"""


def upgrade() -> None:
    # -- life of a unit --
    # In the order in which workers lock rows of theirs: otherwise they and this transaction may wait for each other.
    op.execute("LOCK TABLE jobs, units, scan_results IN ACCESS EXCLUSIVE MODE")
    _allow_units([*UNIT_STATES, "scheduled"], [*UNIT_MOVES, *SCHEDULED_MOVES])
    op.add_column("jobs", sa.Column("warnings", postgresql.JSONB(), server_default="[]", nullable=False))
    op.execute(COUNT_CHANGES.format(hide=" ".join(f"shown.{name} := OLD.{name};" for name in NOT_SHOWN)))
    op.execute(NOTIFY_CHANGES)
    for table, options in STORAGE.items():
        op.execute(f"ALTER TABLE {table} SET ({options})")
    # Entries go into the index at once. Most updates do not touch it, and a search need not read a list beside it.
    op.execute("ALTER INDEX ix_jobs_metadata SET (fastupdate = off)")
    # -- retention --
    op.add_column("scans", sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "released_blobs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("aside", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_released_blobs")),
    )
    op.create_index(op.f("ix_released_blobs_due_at"), "released_blobs", ["due_at"])
    op.execute(RELEASE_BLOBS)
    for table, column in BLOBS_OF.items():
        op.execute(
            f"CREATE TRIGGER released_blobs AFTER DELETE ON {table} REFERENCING OLD TABLE AS deleted "
            f"FOR EACH STATEMENT EXECUTE FUNCTION release_blobs('{column}')"
        )
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
    op.add_column("jobs", sa.Column("tracking_attempts", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("track_after", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # -- webhooks, MLflow --
    op.drop_column("jobs", "track_after")
    op.drop_column("jobs", "tracking_attempts")
    # -- dispatcher and workers --
    # -- retention --
    for table in BLOBS_OF:
        op.execute(f"DROP TRIGGER released_blobs ON {table}")
    op.execute("DROP FUNCTION release_blobs()")
    op.drop_table("released_blobs")
    op.drop_column("scans", "sent_at")
    # -- life of a unit --
    op.execute("ALTER INDEX ix_jobs_metadata RESET (fastupdate)")
    for table, options in STORAGE.items():
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(part.split(' =')[0] for part in options.split(', '))})")
    op.execute(NOTIFY_UPDATES)
    op.execute(COUNT_UPDATES)
    op.drop_column("jobs", "warnings")
    op.execute("UPDATE units SET state = 'queued' WHERE state = 'scheduled'")
    _allow_units(UNIT_STATES, UNIT_MOVES)


def _allow_units(states: list[str], moves: list[str]) -> None:
    """Allow these states and transitions of a unit."""
    op.execute("ALTER TABLE units DROP CONSTRAINT ck_units_state")
    # Not validated: every row has been checked by the constraint that it replaces, and the table may be large.
    op.execute(f"ALTER TABLE units ADD CONSTRAINT ck_units_state CHECK (state IN ({_quoted(states)})) NOT VALID")
    op.execute(MOVE_LEGALLY.format(moves=_quoted(moves)))


def _quoted(words: list[str]) -> str:
    return ", ".join(f"'{word}'" for word in sorted(words))
