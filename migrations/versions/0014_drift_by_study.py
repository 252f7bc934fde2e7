"""Drift counts studies, and a champion keeps whether it has drifted. A column without a default: no row is rewritten.

Revision: 0014, after 0013
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("model_versions", sa.Column("drift", JSONB(), nullable=True))
    op.create_table(
        "study_counts",
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("study", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("scans", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", "day", "study", name="pk_study_counts"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_versions.id"], ondelete="CASCADE", name="fk_study_counts_model_id_model_versions"
        ),
        postgresql_with={"fillfactor": 50},
    )
    op.create_index("ix_study_counts_day", "study_counts", ["day"])


def downgrade() -> None:
    op.drop_table("study_counts")
    op.drop_column("model_versions", "drift")
