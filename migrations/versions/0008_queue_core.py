"""The queue's core: units that wait for a time, revisions that move only when something shown changes, storage settings
of the hot tables.

The code before this revision goes on working while both run.

Revision: 0008, after 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # -- life of a unit --
    # -- retention --
    # -- dispatcher and workers --
    # -- webhooks, MLflow --
    pass


def downgrade() -> None:
    # -- webhooks, MLflow --
    # -- dispatcher and workers --
    # -- retention --
    # -- life of a unit --
    pass
