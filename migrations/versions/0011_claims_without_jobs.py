"""Claims, heartbeats and looks at the queue read no jobs: units know the kind of their job (a column without a default:
no row is rewritten; where it is null, the job is asked), and two small indexes say of which jobs no unit was claimed,
and which are to be cancelled.

Revision: 0011, after 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

CONDITIONS = {
    "ix_jobs_queued": "(state = 'queued') IS TRUE",
    "ix_jobs_cancelling": "(cancel_requested_at IS NOT NULL AND finished_at IS NULL) IS TRUE",
}


def upgrade() -> None:
    # What comes before the block is committed by it: an interrupted upgrade begins anew here.
    op.execute("ALTER TABLE units ADD COLUMN IF NOT EXISTS kind varchar(20)")
    with op.get_context().autocommit_block():
        # A build waits for all older transactions, such as a backup's, and blocks no writer meanwhile. One that was
        # interrupted leaves an invalid index.
        op.execute("SET lock_timeout = 0")
        for name, condition in CONDITIONS.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON jobs (lane, id) WHERE {condition}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in CONDITIONS:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        before = "cancel_requested_at IS NOT NULL AND finished_at IS NULL"
        op.execute(f"CREATE INDEX CONCURRENTLY ix_jobs_cancelling ON jobs (id) WHERE {before}")
    op.drop_column("units", "kind")
