"""Tables of stored scans and of resumable uploads."""

import datetime as dt
import uuid

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Index,
    Integer,
    String,
    Uuid,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import LARGE_TABLE, id_column, optional_time, time_of_insert


class Scan(Base):
    """One stored image or DICOM file. The same bytes of one tenant are stored once."""

    __tablename__ = "scans"
    __table_args__ = (
        # The hash first: blobs are shared by all tenants, and their deletion asks whether any has it.
        Index("uq_scans_sha256_tenant_id", "sha256", "tenant_id", unique=True),
        Index("ix_scans_deletion_id", "deletion_id", postgresql_where=text("deletion_id IS NOT NULL")),
        {"postgresql_with": LARGE_TABLE},
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(40))
    width: Mapped[int | None] = mapped_column(Integer)  # pixels, where the pipeline's items have any
    height: Mapped[int | None] = mapped_column(Integer)
    frames: Mapped[int | None] = mapped_column(Integer)  # null: stored before they were counted
    created_at: Mapped[dt.datetime] = time_of_insert()
    sent_at: Mapped[dt.datetime | None] = optional_time()  # when it was sent again last, to the hour
    # A deletion that takes the scan with it, unless something else needs it or somebody sends it again.
    deletion_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)


class Upload(Base):
    """A resumable upload. Its offset is the length of its file and is stored nowhere else."""

    __tablename__ = "uploads"
    __table_args__ = (CheckConstraint("size >= 0", name="size"),)

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    size: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str | None] = mapped_column(String(500))
    created_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp(), index=True
    )
