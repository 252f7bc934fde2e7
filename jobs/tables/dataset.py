"""The table of datasets."""

import datetime as dt
import uuid

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    String,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.states import (
    DatasetState,
)
from jobs.tables.columns import Json, id_column, one_of, pipeline_column, tenant_column, time_of_insert


class Dataset(Base):
    """An uploaded zip of labelled scans, one folder a class."""

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint(one_of("state", DatasetState), name="state"),
        CheckConstraint("(state = 'ready') <= (digest IS NOT NULL)", name="ready_has_digest"),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = tenant_column()
    pipeline: Mapped[str] = pipeline_column()
    name: Mapped[str] = mapped_column(String(200))
    state: Mapped[str] = mapped_column(String(20), default=DatasetState.CHECKING)
    archive_sha256: Mapped[str] = mapped_column(String(64))
    archive_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str | None] = mapped_column(String(64))  # of the contents; independent of how the zip was packed
    classes: Mapped[dict[str, int] | None] = mapped_column(JSONB)
    problems: Mapped[list[str]] = mapped_column(JSONB, default=list, server_default="[]")
    report: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # {"inspection": {...}, "warnings": [...]}
    job_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    created_at: Mapped[dt.datetime] = time_of_insert()
