"""Batches in depth: results that were not computed anew, that know their patient and study, that come from an address,
that expire; units that explain what others found; and uploads that can be resumed.

The code before this revision neither reads nor writes any of it: both run on the same tables.

Revision: 0005, after 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

WORDS: dict[str, sa.types.TypeEngine[str]] = {
    "patient": sa.String(length=200),
    "study": sa.String(length=200),
    "source_url": sa.Text(),
}
COMPUTED = "state = 'succeeded' AND NOT cached"
UNEXPIRED = "kind IN ('predict', 'predict_batch') AND results_expired_at IS NULL"


def upgrade() -> None:
    for name, kind in WORDS.items():
        op.add_column("scan_results", sa.Column(name, kind, nullable=True))
    op.add_column("scan_results", sa.Column("cached", sa.Boolean(), server_default="false", nullable=False))
    op.create_index("ix_scan_results_computed", "scan_results", ["scan_id"], postgresql_where=sa.text(COMPUTED))
    op.add_column("units", sa.Column("explains", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("results_expired_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_unexpired", "jobs", ["finished_at"], postgresql_where=sa.text(UNEXPIRED))
    op.create_table(
        "uploads",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=500), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("size >= 0", name=op.f("ck_uploads_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_created_at"), "uploads", ["created_at"])


def downgrade() -> None:
    op.drop_table("uploads")
    op.drop_index("ix_jobs_unexpired", table_name="jobs", postgresql_where=sa.text(UNEXPIRED))
    op.drop_column("jobs", "results_expired_at")
    op.drop_column("units", "explains")
    op.drop_index("ix_scan_results_computed", table_name="scan_results", postgresql_where=sa.text(COMPUTED))
    for name in ("cached", *WORDS):
        op.drop_column("scan_results", name)
