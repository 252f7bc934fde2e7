"""The table of results of predictions."""

import datetime as dt
import uuid

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.states import (
    ResultState,
)
from jobs.tables.columns import LARGE_TABLE, Json, one_of, optional_time

STUDY_UID = text("(identity ->> 'study_uid')")
NOT_SUCCEEDED = frozenset((ResultState.FAILED, ResultState.CANCELLED))


class ScanResult(Base):
    """The result of one scan in a prediction job: inserted as pending with the job, ended exactly once."""

    __tablename__ = "scan_results"
    __table_args__ = (
        CheckConstraint(one_of("state", ResultState), name="state"),
        CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="finished_is_ended"),
        CheckConstraint(
            "(state = 'succeeded') = (label IS NOT NULL OR output IS NOT NULL)", name="succeeded_has_output"
        ),
        Index("ix_scan_results_unit_id", "unit_id"),
        # For the first pending scan of a running job, and for the few failures among millions of results.
        Index("ix_scan_results_pending", "job_id", "ordinal", postgresql_where=text("state = 'pending'")),
        # For the result cache, and for the deletion of scans that no result needs.
        Index("ix_scan_results_scan_id_cached", "scan_id", "cached"),
        Index(
            "ix_scan_results_not_succeeded",
            "job_id",
            "ordinal",
            postgresql_where=text(one_of("state", NOT_SUCCEEDED)),
        ),
        # For GET /studies/{uid} and GET /jobs?custom_id=.
        Index(
            "ix_scan_results_study_uid",
            "tenant_id",
            STUDY_UID,
            "job_id",
            postgresql_where=text("identity ->> 'study_uid' IS NOT NULL"),
        ),
        Index(
            "ix_scan_results_custom_id",
            "tenant_id",
            "custom_id",
            "job_id",
            postgresql_where=text("custom_id IS NOT NULL"),
        ),
        {"postgresql_with": LARGE_TABLE},
    )

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    unit_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("units.id", ondelete="CASCADE"))
    scan_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("scans.id"))  # null: not stored
    frame: Mapped[int | None] = mapped_column(Integer)  # which of a file's several frames, from 0; null: the whole file
    name: Mapped[str | None] = mapped_column(String(500))
    custom_id: Mapped[str | None] = mapped_column(String(200))
    patient: Mapped[str | None] = mapped_column(String(200))  # the client's own keys, for grouping results
    study: Mapped[str | None] = mapped_column(String(200))
    source_url: Mapped[str | None] = mapped_column(Text)  # where the worker fetches a scan that is not stored
    state: Mapped[str] = mapped_column(String(20), default=ResultState.PENDING)
    label: Mapped[str | None] = mapped_column(String(100))
    confidence: Mapped[float | None] = mapped_column(Double)
    probabilities: Mapped[dict[str, float] | None] = mapped_column(JSONB(none_as_null=True))
    # Whose slice it is, as its file says (see ml.pipelines.Prediction): {} if nothing, null if nobody has looked.
    identity: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    output: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # what else the pipeline answers
    engine: Mapped[str | None] = mapped_column(String(40))  # such as openvino-bf16
    cached: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")  # from the result cache
    disposition: Mapped[str | None] = mapped_column(
        String(100)
    )  # how the prediction may be used: see ml/image/serving/disposition.py
    reason: Mapped[str | None] = mapped_column(Text)  # why it is indeterminate or rejected
    ood_score: Mapped[float | None] = mapped_column(Double)  # above 1: out of distribution
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    finished_at: Mapped[dt.datetime | None] = optional_time()
