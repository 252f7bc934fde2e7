"""Which engine computed a result: of each result, and all of a job's. Results found by their state.

The code before this revision neither reads nor writes the columns: both run on the same tables.

Revision: 0004, after 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
INDEXES = {
    "ix_scan_results_pending": "state = 'pending'",
    "ix_scan_results_not_succeeded": "state IN ('cancelled', 'failed')",
}


def upgrade() -> None:
    engines = postgresql.ARRAY(sa.String(length=40))
    op.add_column("jobs", sa.Column("engines", engines, server_default="{}", nullable=False))
    op.add_column("scan_results", sa.Column("engine", sa.String(length=40), nullable=True))
    for name, condition in INDEXES.items():
        op.create_index(name, "scan_results", ["job_id", "ordinal"], postgresql_where=sa.text(condition))


def downgrade() -> None:
    for name, condition in INDEXES.items():
        op.drop_index(name, table_name="scan_results", postgresql_where=sa.text(condition))
    op.drop_column("scan_results", "engine")
    op.drop_column("jobs", "engines")
