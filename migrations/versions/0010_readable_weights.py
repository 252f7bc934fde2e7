"""Workers report the weights that they can read. A column without a default: no row is rewritten.

Revision: 0010, after 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("processes", sa.Column("weights", JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("processes", "weights")
