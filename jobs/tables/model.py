"""Tables of model versions: their scores, promotions, prediction counts (for drift) and feedback."""

import datetime as dt
import uuid
from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    String,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import (
    COUNTERS,
    Json,
    id_column,
    one_of,
    optional_time,
    pipeline_column,
    task_column,
    tenant_column,
    time_of_insert,
)


class ModelVersion(Base):
    """The result of a successful training. A partial index allows one champion per tenant."""

    __tablename__ = "model_versions"
    __table_args__ = (
        Index("uq_model_versions_tenant_id_version", "tenant_id", "version", unique=True),
        Index(
            "uq_model_versions_champion",
            "tenant_id",
            "pipeline",
            "task",
            unique=True,
            postgresql_where=text("champion"),
        ),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    version: Mapped[int] = mapped_column(Integer)
    pipeline: Mapped[str] = pipeline_column()
    task: Mapped[str] = task_column()
    champion: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), unique=True)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id", ondelete="SET NULL"))
    dataset_digest: Mapped[str | None] = mapped_column(String(64))
    weights_sha256: Mapped[str] = mapped_column(String(64))
    classes: Mapped[list[str]] = mapped_column(JSONB)
    params: Mapped[Json] = mapped_column(JSONB)
    metrics: Mapped[Json] = mapped_column(JSONB)
    gate: Mapped[Json] = mapped_column(JSONB)  # {"promoted": bool, "reasons": [...]}
    code_revision: Mapped[str | None] = mapped_column(String(64))
    environment: Mapped[Json] = mapped_column(JSONB, default=dict)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_version: Mapped[str | None] = mapped_column(String(20))  # its number in MLflow's registry, once synced
    reference: Mapped[Json | None] = mapped_column(
        JSONB(none_as_null=True)
    )  # histograms of its test scans; see jobs/models/drift.py
    scan_scores: Mapped[Json | None] = mapped_column(
        JSONB(none_as_null=True), deferred=True
    )  # of its validation and test scans; see ml/evaluation/operating.py. Large: read by jobs/models/operating_points
    drift: Mapped[Json | None] = mapped_column(
        JSONB(none_as_null=True)
    )  # {"day", "figures"} while the champion's latest day has drifted; see check_drift
    created_at: Mapped[dt.datetime] = time_of_insert()
    promoted_at: Mapped[dt.datetime | None] = optional_time()


class ModelEvaluation(Base):
    """A version's scores on one set of test scans: its own set, or that of a later training it was compared on."""

    __tablename__ = "model_evaluations"
    __table_args__ = (Index("ix_model_evaluations_job_id", "job_id"),)

    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    test_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    scans: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[Json] = mapped_column(JSONB)
    created_at: Mapped[dt.datetime] = time_of_insert()


class PromotionMethod(StrEnum):
    """How a version became champion."""

    GATE = "gate"  # by the gate, when its training ended
    REQUEST = "request"  # by request, and the gate passed
    FORCE = "force"  # by request against the gate, with a reason
    ROLLBACK = "rollback"


class Promotion(Base):
    """A change of the champion: who, when, why. Append-only (a trigger); the latest row names the champion.

    `back_id` is the promotion that a rollback returns to. A rollback copies the `back_id` of the promotion it returned
    to, so that the next rollback goes one step further.
    """

    __tablename__ = "promotions"
    __table_args__ = (
        CheckConstraint(one_of("how", PromotionMethod), name="how"),
        CheckConstraint("(how <> 'force') OR (reason IS NOT NULL)", name="force_has_reason"),
        Index("ix_promotions_tenant_id_id", "tenant_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    pipeline: Mapped[str] = pipeline_column()
    task: Mapped[str] = task_column()
    model_id: Mapped[uuid.UUID] = mapped_column(Uuid)  # no foreign key: the history outlives a deleted version
    version: Mapped[int] = mapped_column(Integer)
    replaced: Mapped[int | None] = mapped_column(Integer)  # the version that was champion before
    back_id: Mapped[int | None] = mapped_column(ForeignKey("promotions.id"))
    how: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Text)
    verdict: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # the gate's: {"promoted", "reasons"}
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at: Mapped[dt.datetime] = time_of_insert()


class OperatingPointChange(Base):
    """A version's operating point was set anew, without a training: what to, from what, why. Append-only."""

    __tablename__ = "operating_point_changes"
    __table_args__ = (Index("ix_operating_point_changes_model_id", "model_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    model_id: Mapped[uuid.UUID] = mapped_column(Uuid)  # no foreign key, as of promotions
    point: Mapped[Json] = mapped_column(JSONB)  # see ml.spec.operating_point.OperatingPoint
    replaced: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    reason: Mapped[str] = mapped_column(Text)
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at: Mapped[dt.datetime] = time_of_insert()


class RegistryMirror(Base):
    """The last promotion of a tenant that was synced to MLflow's registry."""

    __tablename__ = "registry_mirrors"

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    promotion_id: Mapped[int] = mapped_column(BigInteger)


class PredictionCount(Base):
    """How many scans a version predicted on a day (UTC) in one bin of one figure. Drift is computed from these counts.

    `what`: an input statistic, `confidence`, `class`, `disposition` or `study`. `bin`: the index of a bin of the
    version's reference, or a word. Results from the cache are not counted again.
    """

    __tablename__ = "prediction_counts"
    __table_args__ = ({"postgresql_with": COUNTERS},)

    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    day: Mapped[dt.date] = mapped_column(Date, primary_key=True)
    what: Mapped[str] = mapped_column(String(40), primary_key=True)
    bin: Mapped[str] = mapped_column(String(100), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    scans: Mapped[int] = mapped_column(BigInteger)


class StudyCount(Base):
    """How many scans of a study a version predicted on a day (UTC), so that drift can give each study one vote.

    `study`: a hash of the client's names of patient and study. Rows are needed on their day only; what drift reads is
    summed up in `PredictionCount`.
    """

    __tablename__ = "study_counts"
    __table_args__ = (Index("ix_study_counts_day", "day"), {"postgresql_with": COUNTERS})

    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    day: Mapped[dt.date] = mapped_column(Date, primary_key=True)
    study: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    scans: Mapped[int] = mapped_column(BigInteger)


class Truth(Base):
    """Feedback: the true label of a scan that was predicted. Append-only; the latest row of a scan and model counts.

    It copies the prediction, since results expire.
    """

    __tablename__ = "truths"
    __table_args__ = (
        Index("ix_truths_model_id_scan_id", "model_id", "scan_id", "id"),
        # For the foreign keys' checks when a scan or a job is deleted.
        Index("ix_truths_scan_id", "scan_id"),
        Index("ix_truths_job_id", "job_id"),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = tenant_column()
    scan_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("scans.id"))
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"))
    label: Mapped[str] = mapped_column(String(100))
    predicted: Mapped[str] = mapped_column(String(100))
    confidence: Mapped[float] = mapped_column(Double)
    disposition: Mapped[str | None] = mapped_column(String(100))
    patient: Mapped[str | None] = mapped_column(String(200))  # the client's own key, copied from the result
    predicted_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True))
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at: Mapped[dt.datetime] = time_of_insert()
