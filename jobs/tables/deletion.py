"""Tables of deletions: their receipts, and the runs in MLflow that are still to be deleted."""

import datetime as dt
import uuid
from enum import StrEnum

from sqlalchemy import Boolean, CheckConstraint, DateTime, Index, Integer, String, Uuid, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import id_column, one_of, optional_time, time_of_insert


class DeletionKind(StrEnum):
    """What was asked to be deleted."""

    JOB = "job"
    SCAN = "scan"
    MODEL = "model"  # a version, with the training that made it
    DATASET = "dataset"  # with the jobs that checked it


class Deletion(Base):
    """A request to delete something: its receipt, and the audit line that stays. It names what it deleted by its id
    only. A trigger keeps finished ones as they are."""

    __tablename__ = "deletions"
    __table_args__ = (
        CheckConstraint(one_of("kind", DeletionKind), name="kind"),
        # One receipt for each thing, however often its deletion is asked for.
        Index("uq_deletions_tenant_id_kind_target", "tenant_id", "kind", "target", unique=True),
        Index("ix_deletions_tenant_id_id", "tenant_id", "id"),
        Index("ix_deletions_unfinished", "due_at", postgresql_where=text("finished_at IS NULL")),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(20))
    target: Mapped[str] = mapped_column(String(40))  # an id, or a version's number
    model_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # of a version
    with_scans: Mapped[bool] = mapped_column(Boolean, default=True, server_default="true")  # of a job
    counts: Mapped[dict[str, int]] = mapped_column(JSONB, default=dict, server_default="{}")  # what went, by kind
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    created_at: Mapped[dt.datetime] = time_of_insert()
    due_at: Mapped[dt.datetime] = time_of_insert()  # of the next step
    finished_at: Mapped[dt.datetime | None] = optional_time()


class ReleasedRun(Base):
    """A deleted training whose run in MLflow is to be deleted. `deletion_id`: null if retention deleted the job."""

    __tablename__ = "released_runs"

    job_id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64))
    deletion_id: Mapped[uuid.UUID | None] = mapped_column(Uuid, index=True)
    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    due_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp(), index=True
    )
