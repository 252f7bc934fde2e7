"""Operating points: scores that a version keeps, the point that a job is pinned to, and the history of changes.

Nullable columns, so that no row is rewritten; the code before this revision neither reads nor writes them.

Revision: 0012, after 0011
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TRIGGER = """
-- Who moved a threshold, and why, stays as it was written.
CREATE FUNCTION operating_point_changes_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'change % of an operating point is history: it is neither changed nor deleted', OLD.id
        USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER operating_point_changes_are_kept BEFORE UPDATE OR DELETE ON operating_point_changes
    FOR EACH ROW EXECUTE FUNCTION operating_point_changes_are_kept();
"""


def upgrade() -> None:
    op.add_column("model_versions", sa.Column("scan_scores", JSONB(), nullable=True))
    op.add_column("jobs", sa.Column("operating_point", JSONB(), nullable=True))
    op.create_table(
        "operating_point_changes",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("point", JSONB(), nullable=False),
        sa.Column("replaced", JSONB(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("by_key", sa.Uuid(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_versions.id"], name=op.f("fk_operating_point_changes_model_id_model_versions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operating_point_changes")),
    )
    op.create_index("ix_operating_point_changes_model_id", "operating_point_changes", ["model_id", "id"])
    op.execute(TRIGGER)


def downgrade() -> None:
    op.drop_table("operating_point_changes")
    op.execute("DROP FUNCTION operating_point_changes_are_kept()")
    op.drop_column("jobs", "operating_point")
    op.drop_column("model_versions", "scan_scores")
