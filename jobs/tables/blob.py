"""The table of blobs whose last referring row may be gone."""

import datetime as dt
import uuid

from sqlalchemy import (
    Boolean,
    DateTime,
    String,
    Uuid,
    func,
)
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base


class ReleasedBlob(Base):
    """A blob that a deleted row referred to, or that had no row: see jobs/retention/blobs.py. Filled by triggers.

    It belongs to no tenant: two tenants that store equal bytes share a blob.
    """

    __tablename__ = "released_blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    aside: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")  # moved aside in the store
    due_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp(), index=True
    )
    deletion_id: Mapped[uuid.UUID | None] = mapped_column(Uuid, index=True)  # whose receipt waits for it
