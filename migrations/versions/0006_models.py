"""A registry that remembers: promotions with their reasons, scores on shared test scans, what MLflow mirrors; what a
prediction knows of its limits, and what became of it; webhooks.

The code before this revision neither reads nor writes any of it, but for champions: one that it promotes while both
run has no promotion of its own, and `GET /models/promotions` does not know of it.

Revision: 0006, after 0005
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BACKFILL = """
-- The champions so far, each replaced by the next.
INSERT INTO promotions (tenant_id, model_id, version, replaced, how, verdict, at)
    SELECT tenant_id, id, version, lag(version) OVER (PARTITION BY tenant_id ORDER BY promoted_at), 'gate', gate,
        promoted_at
    FROM model_versions WHERE promoted_at IS NOT NULL ORDER BY promoted_at;
UPDATE promotions SET back_id = earlier.back_id FROM (
    SELECT id, lag(id) OVER (PARTITION BY tenant_id ORDER BY id) AS back_id FROM promotions
) AS earlier WHERE promotions.id = earlier.id;
INSERT INTO model_evaluations (model_id, test_digest, tenant_id, job_id, scans, metrics, created_at)
    SELECT id, metrics ->> 'test_digest', tenant_id, job_id, coalesce((metrics ->> 'held_out')::int, 0), metrics,
        created_at
    FROM model_versions
    WHERE metrics ->> 'test_digest' IS NOT NULL AND NOT jsonb_path_exists(metrics, '$.leaks.* ? (@ > 0)');
"""

TRIGGER = """
-- Who decided what, and why, stays as it was written.
CREATE FUNCTION promotions_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'promotion % is history: it is neither changed nor deleted', OLD.id
        USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER promotions_are_kept BEFORE UPDATE OR DELETE ON promotions
    FOR EACH ROW EXECUTE FUNCTION promotions_are_kept();
"""


def upgrade() -> None:
    op.create_table(
        "registry_mirrors",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("promotion_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_registry_mirrors")),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", postgresql.ARRAY(sa.String(length=40)), nullable=False),
        sa.Column("secret", sa.String(length=100), nullable=False),
        sa.Column("tried_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_index(op.f("ix_webhooks_tenant_id"), "webhooks", ["tenant_id"], unique=False)
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("webhook_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.String(length=80), nullable=False),
        sa.Column("type", sa.String(length=40), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.String(length=20), server_default="pending", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.String(length=200), nullable=True),
        sa.Column("next_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('delivered', 'failed', 'pending')", name=op.f("ck_deliveries_state")),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_deliveries_webhook_id_webhooks"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index(
        "ix_deliveries_pending", "deliveries", ["next_at"], unique=False, postgresql_where=sa.text("state = 'pending'")
    )
    op.create_index("uq_deliveries_webhook_id_event_id", "deliveries", ["webhook_id", "event_id"], unique=True)
    op.create_table(
        "model_evaluations",
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("test_digest", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("scans", sa.Integer(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_model_evaluations_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(
            ["model_id"],
            ["model_versions.id"],
            name=op.f("fk_model_evaluations_model_id_model_versions"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_id", "test_digest", name=op.f("pk_model_evaluations")),
    )
    op.create_table(
        "prediction_counts",
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("what", sa.String(length=40), nullable=False),
        sa.Column("bin", sa.String(length=100), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("scans", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"],
            ["model_versions.id"],
            name=op.f("fk_prediction_counts_model_id_model_versions"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_id", "day", "what", "bin", name=op.f("pk_prediction_counts")),
    )
    op.create_table(
        "promotions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("replaced", sa.Integer(), nullable=True),
        sa.Column("back_id", sa.BigInteger(), nullable=True),
        sa.Column("how", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("verdict", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("by_key", sa.Uuid(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.CheckConstraint("(how <> 'force') OR (reason IS NOT NULL)", name=op.f("ck_promotions_force_has_reason")),
        sa.CheckConstraint("how IN ('force', 'gate', 'request', 'rollback')", name=op.f("ck_promotions_how")),
        sa.ForeignKeyConstraint(["back_id"], ["promotions.id"], name=op.f("fk_promotions_back_id_promotions")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_versions.id"], name=op.f("fk_promotions_model_id_model_versions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    op.create_index("ix_promotions_tenant_id_id", "promotions", ["tenant_id", "id"], unique=False)
    op.create_table(
        "truths",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("scan_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("label", sa.String(length=100), nullable=False),
        sa.Column("predicted", sa.String(length=100), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("disposition", sa.String(length=100), nullable=True),
        sa.Column("patient", sa.String(length=200), nullable=True),
        sa.Column("predicted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("by_key", sa.Uuid(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_truths_job_id_jobs"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_versions.id"], name=op.f("fk_truths_model_id_model_versions"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["scan_id"], ["scans.id"], name=op.f("fk_truths_scan_id_scans")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_truths")),
    )
    op.create_index("ix_truths_model_id_scan_id", "truths", ["model_id", "scan_id", "id"], unique=False)
    op.create_index(op.f("ix_truths_tenant_id"), "truths", ["tenant_id"], unique=False)
    op.add_column("idempotency_keys", sa.Column("made_id", sa.Uuid(), nullable=True))
    op.add_column("model_versions", sa.Column("mlflow_version", sa.String(length=20), nullable=True))
    op.add_column(
        "model_versions",
        sa.Column("reference", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
    )
    op.add_column("scan_results", sa.Column("disposition", sa.String(length=100), nullable=True))
    op.add_column("scan_results", sa.Column("reason", sa.Text(), nullable=True))
    op.add_column("scan_results", sa.Column("ood_score", sa.Double(), nullable=True))
    op.execute(BACKFILL)
    op.execute(TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER promotions_are_kept ON promotions")
    op.execute("DROP FUNCTION promotions_are_kept()")
    op.drop_column("scan_results", "ood_score")
    op.drop_column("scan_results", "reason")
    op.drop_column("scan_results", "disposition")
    op.drop_column("model_versions", "reference")
    op.drop_column("model_versions", "mlflow_version")
    op.drop_column("idempotency_keys", "made_id")
    op.drop_index(op.f("ix_truths_tenant_id"), table_name="truths")
    op.drop_index("ix_truths_model_id_scan_id", table_name="truths")
    op.drop_table("truths")
    op.drop_index("ix_promotions_tenant_id_id", table_name="promotions")
    op.drop_table("promotions")
    op.drop_table("prediction_counts")
    op.drop_table("model_evaluations")
    op.drop_index("uq_deliveries_webhook_id_event_id", table_name="deliveries")
    op.drop_index("ix_deliveries_pending", table_name="deliveries", postgresql_where=sa.text("state = 'pending'"))
    op.drop_table("deliveries")
    op.drop_index(op.f("ix_webhooks_tenant_id"), table_name="webhooks")
    op.drop_table("webhooks")
    op.drop_table("registry_mirrors")
