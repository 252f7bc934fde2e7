"""A training may name a dataset to be tested on. A column without a default: no row is rewritten.

Revision: 0013, after 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("test_dataset_id", sa.Uuid(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "test_dataset_id")
