"""Tables of a job: its row, events, artifacts, checkpoints and the load of its tenant."""

import datetime as dt
import uuid

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
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
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.states import (
    TERMINAL,
    JobKind,
    JobState,
    Lane,
)
from jobs.tables.columns import (
    COUNTERS,
    HOT_TABLE,
    LARGE_TABLE,
    Json,
    counter,
    id_column,
    one_of,
    optional_time,
    pipeline_column,
    task_column,
    time_of_insert,
)

NOT_SHOWN = frozenset(
    {
        "tenant_id", "lane", "revision", "source_url", "model_id", "base_model_id", "promote", "tracked_at",
        "tracking_attempts", "track_after", "idempotency_key", "created_by",
    }
)  # fmt: skip
"""Columns of a job that no response of the API depends on."""


IS_QUEUED = "(state = 'queued') IS TRUE"
IS_CANCELLING = "(cancel_requested_at IS NOT NULL AND finished_at IS NULL) IS TRUE"
"""SQL: the job waits for its first claim; it is to be cancelled. IS TRUE keeps the planner from all indexes but the
small one of this name."""


class Job(Base):
    """One request for work. A trigger increments `revision`, the ETag, and notifies, whenever a column changes that is
    not `NOT_SHOWN`."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(one_of("kind", JobKind), name="kind"),
        CheckConstraint(one_of("lane", Lane), name="lane"),
        CheckConstraint(one_of("state", JobState), name="state"),
        CheckConstraint(f"({one_of('state', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_is_terminal"),
        CheckConstraint("succeeded + failed + cancelled <= total", name="counts"),
        CheckConstraint("progress >= 0 AND progress <= 1", name="progress"),
        Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
        # For the dispatcher and the queue position: finished jobs cost them nothing.
        Index("ix_jobs_unfinished", "lane", "tenant_id", "id", postgresql_where=text("finished_at IS NULL")),
        # One idempotency key makes one job, and a job has one retry, however many API processes race.
        Index(
            "uq_jobs_tenant_id_idempotency_key",
            "tenant_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index("uq_jobs_retry_of", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
        # For the foreign key's check when a job is deleted.
        Index("ix_jobs_reproduction_of", "reproduction_of", postgresql_where=text("reproduction_of IS NOT NULL")),
        Index(
            "ix_jobs_unexpired",
            "finished_at",
            postgresql_where=text("kind IN ('predict', 'predict_batch') AND results_expired_at IS NULL"),
        ),
        # For lists by state, kind or pipeline: few of many jobs failed, and few are trainings.
        Index("ix_jobs_not_succeeded", "tenant_id", "state", "id", postgresql_where=text("state <> 'succeeded'")),
        Index("ix_jobs_not_predict", "tenant_id", "kind", "id", postgresql_where=text("kind <> 'predict'")),
        Index("ix_jobs_not_image", "tenant_id", "pipeline", "id", postgresql_where=text("pipeline <> 'image'")),
        # For retention. Predictions enter it when their results have expired.
        Index(
            "ix_jobs_deletable",
            "finished_at",
            postgresql_where=text(
                "finished_at IS NOT NULL "
                "AND (kind NOT IN ('predict', 'predict_batch') OR results_expired_at IS NOT NULL)"
            ),
        ),
        Index("ix_jobs_untracked", "id", postgresql_where=text("kind = 'train' AND tracked_at IS NULL")),
        Index(
            "ix_jobs_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            postgresql_with={"fastupdate": "off"},
        ),
        # For claims: whether it is the first of its job.
        Index("ix_jobs_queued", "lane", "id", postgresql_where=text(IS_QUEUED)),
        # For claims and heartbeats, and for the leader, which ends the units of large cancelled jobs.
        Index("ix_jobs_cancelling", "lane", "id", postgresql_where=text(IS_CANCELLING)),
        {"postgresql_with": HOT_TABLE},
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(20))
    pipeline: Mapped[str] = pipeline_column()
    task: Mapped[str] = task_column()
    lane: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20), default=JobState.QUEUED)
    revision: Mapped[int] = mapped_column(BigInteger, default=1, server_default="1")
    name: Mapped[str | None] = mapped_column(String(200))
    params: Mapped[Json] = mapped_column(JSONB, default=dict)
    labels: Mapped[Json] = mapped_column(
        "metadata", JSONB, default=dict
    )  # SQLAlchemy reserves the attribute `metadata`
    source_url: Mapped[str | None] = mapped_column(Text)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id", ondelete="SET NULL"), index=True)
    test_dataset_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # a training is tested on it, and on nothing else
    model_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # pinned at submit, or made by this training
    model_version: Mapped[int | None] = mapped_column(Integer)
    operating_point: Mapped[Json | None] = mapped_column(
        JSONB(none_as_null=True)
    )  # of the model at submit: {"positive": [...], "threshold": t}; null: no positive class, or an older row
    base_model_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # what a training starts from: `weights: version:N`
    promote: Mapped[str] = mapped_column(String(10), default="auto", server_default="auto")
    cancel_requested_at: Mapped[dt.datetime | None] = optional_time()
    stage: Mapped[str | None] = mapped_column(String(40))
    stages: Mapped[list[Json]] = mapped_column(JSONB, default=list, server_default="[]")
    progress: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    attempt: Mapped[int] = counter()
    total: Mapped[int] = counter()
    succeeded: Mapped[int] = counter()
    failed: Mapped[int] = counter()
    cancelled: Mapped[int] = counter()
    metrics: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # of a failed job, or of a cancelled one
    warnings: Mapped[list[Json]] = mapped_column(JSONB, default=list, server_default="[]")  # errors that failed no scan
    device_seconds: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    engines: Mapped[list[str]] = mapped_column(
        ARRAY(String(40)), default=list, server_default="{}"
    )  # that computed its results
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    tracked_at: Mapped[dt.datetime | None] = optional_time()  # when MLflow had received all of an ended training
    tracking_attempts: Mapped[int] = counter()  # to record it there, if it missed the training; see worker/tracking
    track_after: Mapped[dt.datetime | None] = optional_time()  # earliest time of the next attempt
    idempotency_key: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of the client's header, for a day
    retry_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    reproduction_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    reproduction: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # see jobs/models/reproduction.py
    created_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    created_at: Mapped[dt.datetime] = time_of_insert()
    started_at: Mapped[dt.datetime | None] = optional_time()
    finished_at: Mapped[dt.datetime | None] = optional_time()
    results_expired_at: Mapped[dt.datetime | None] = optional_time()  # when a prediction's results were deleted


TERMINAL_EVENTS = frozenset(str(state) for state in TERMINAL)
"""A job's last event has the name of its final state."""


class JobEvent(Base):
    """Append-only log of a job. A partial index allows one terminal event per job."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job_id_id", "job_id", "id"),
        Index(
            "uq_job_events_terminal",
            "job_id",
            unique=True,
            postgresql_where=text(one_of("type", TERMINAL_EVENTS)),
        ),
        {"postgresql_with": LARGE_TABLE},
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[Json] = mapped_column(JSONB, default=dict)
    at: Mapped[dt.datetime] = time_of_insert()


class Artifact(Base):
    """A named blob of a job."""

    __tablename__ = "artifacts"
    __table_args__ = (
        # For the deletion of blobs. A hash index: 16 bytes an entry instead of 80.
        Index("ix_artifacts_sha256", "sha256", postgresql_using="hash"),
        {"postgresql_with": LARGE_TABLE},
    )

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[dt.datetime] = time_of_insert()


class Checkpoint(Base):
    """A training's state after an epoch, in the blob store. Path and row hold the fence of their writer."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("ix_checkpoints_job_id", "job_id"),)

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    fence: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(Text)  # within the store
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[dt.datetime] = time_of_insert()


class TenantLoad(Base):
    """A tenant's share of the queue. Submitting and finishing jobs update it, so that a quota check reads one row."""

    __tablename__ = "tenant_loads"
    __table_args__ = (
        CheckConstraint("scans >= 0 AND batches >= 0", name="counts"),
        {"postgresql_with": COUNTERS},
    )

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    scans: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # of jobs that have not ended
    batches: Mapped[int] = mapped_column(Integer, default=0, server_default="0")  # batches that have not ended
