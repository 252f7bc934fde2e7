"""Heartbeats of dispatchers and workers."""

import datetime as dt

from sqlalchemy import (
    Boolean,
    String,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import COUNTERS, Json, time_of_insert


class Process(Base):
    """The latest heartbeat of a worker or dispatcher. It belongs to no tenant, since it serves all of them."""

    __tablename__ = "processes"
    __table_args__ = ({"postgresql_with": COUNTERS},)

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    lanes: Mapped[list[str]] = mapped_column(ARRAY(String(20)), default=list)
    broker_reachable: Mapped[bool] = mapped_column(Boolean, default=False)
    seen_at: Mapped[dt.datetime] = time_of_insert()
    device: Mapped[str | None] = mapped_column(String(100))  # what a worker computes on; null: it has not said
    weights: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # by pipeline; null: it has not said
