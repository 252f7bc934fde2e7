"""A dataset's report, a training's base version, and reproductions of trainings.

All columns may be null, and the code before this revision neither reads nor writes them: both run on the same tables.

Revision: 0003, after 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("report", _json(), nullable=True))
    op.add_column("jobs", sa.Column("base_model_id", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("reproduction_of", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("reproduction", _json(), nullable=True))
    op.create_foreign_key(
        op.f("fk_jobs_reproduction_of_jobs"), "jobs", "jobs", ["reproduction_of"], ["id"], ondelete="SET NULL"
    )
    op.create_index(
        "ix_jobs_reproduction_of",
        "jobs",
        ["reproduction_of"],
        unique=False,
        postgresql_where=sa.text("reproduction_of IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_reproduction_of", table_name="jobs", postgresql_where=sa.text("reproduction_of IS NOT NULL"))
    op.drop_constraint(op.f("fk_jobs_reproduction_of_jobs"), "jobs", type_="foreignkey")
    op.drop_column("jobs", "reproduction")
    op.drop_column("jobs", "reproduction_of")
    op.drop_column("jobs", "base_model_id")
    op.drop_column("datasets", "report")


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())
