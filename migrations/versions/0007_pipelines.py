"""Pipelines and tasks: a dataset, a job and a model version say which pipeline they are of, and there is a champion for
each tenant, pipeline and task. A scan has a width and a height only where its pipeline's items have any; a result may
hold whatever else its pipeline answers.

All rows so far are of the pipeline `image` and the task `default`. The code before this revision goes on working while
both run: it reads and writes those alone.

Revision: 0007, after 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

PIPELINE = ("datasets", "jobs", "model_versions", "promotions")
TASK = ("jobs", "model_versions", "promotions")
SUCCEEDED = "(state = 'succeeded') = (label IS NOT NULL OR output IS NOT NULL)"


def upgrade() -> None:
    for table in PIPELINE:
        op.add_column(table, sa.Column("pipeline", sa.String(40), server_default="image", nullable=False))
    for table in TASK:
        op.add_column(table, sa.Column("task", sa.String(40), server_default="default", nullable=False))
    op.drop_index("uq_model_versions_champion", "model_versions")
    op.create_index(
        "uq_model_versions_champion",
        "model_versions",
        ["tenant_id", "pipeline", "task"],
        unique=True,
        postgresql_where=sa.text("champion"),
    )
    op.alter_column("scans", "width", nullable=True)
    op.alter_column("scans", "height", nullable=True)
    op.add_column("scan_results", sa.Column("output", postgresql.JSONB(), nullable=True))
    op.drop_constraint(op.f("ck_scan_results_succeeded_has_label"), "scan_results")
    # Not validated: every row so far has been checked by the constraint that it replaces, and the table may be large.
    op.execute(
        f"ALTER TABLE scan_results ADD CONSTRAINT ck_scan_results_succeeded_has_output CHECK ({SUCCEEDED}) NOT VALID"
    )


def downgrade() -> None:
    """Versions of other pipelines and tasks, and what was predicted with them, have to be gone: what is left of them
    would be taken for the image pipeline's."""
    op.execute("ALTER TABLE scan_results DROP CONSTRAINT ck_scan_results_succeeded_has_output")
    op.create_check_constraint(
        op.f("ck_scan_results_succeeded_has_label"), "scan_results", "(state = 'succeeded') = (label IS NOT NULL)"
    )
    op.drop_column("scan_results", "output")
    op.alter_column("scans", "height", nullable=False)
    op.alter_column("scans", "width", nullable=False)
    op.drop_index("uq_model_versions_champion", "model_versions")
    op.create_index(
        "uq_model_versions_champion", "model_versions", ["tenant_id"], unique=True, postgresql_where=sa.text("champion")
    )
    for table in TASK:
        op.drop_column(table, "task")
    for table in PIPELINE:
        op.drop_column(table, "pipeline")
