"""Results say which frame of a file they are of, and whose slice it is; scans say how many frames they have.

Columns without a default: no row is rewritten, and the code before this revision goes on working. It writes results
without an identity, which are not copied from the result cache then. The indexes are built without blocking writes; see
0009.

Revision: 0015, after 0014
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_scan_results_study_uid": (
        "ON scan_results (tenant_id, (identity ->> 'study_uid'), job_id) WHERE identity ->> 'study_uid' IS NOT NULL"
    ),
    "ix_scan_results_custom_id": "ON scan_results (tenant_id, custom_id, job_id) WHERE custom_id IS NOT NULL",
}


def upgrade() -> None:
    op.add_column("scans", sa.Column("frames", sa.Integer(), nullable=True))
    op.add_column("scan_results", sa.Column("frame", sa.Integer(), nullable=True))
    op.add_column("scan_results", sa.Column("identity", JSONB(), nullable=True))
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name, definition in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} {definition}")


def downgrade() -> None:
    """Results of single frames become results of their file."""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        for name in INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    op.drop_column("scan_results", "identity")
    op.drop_column("scan_results", "frame")
    op.drop_column("scans", "frames")
