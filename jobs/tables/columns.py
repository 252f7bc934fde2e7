"""Shared column definitions."""

import datetime as dt
import uuid
from enum import StrEnum
from typing import Any

import uuid_utils
from sqlalchemy import (
    DateTime,
    Integer,
    String,
    Uuid,
    func,
)
from sqlalchemy.orm import Mapped, mapped_column

from ml.spec.pipeline import DEFAULT_TASK, IMAGE

Json = dict[str, Any]

HOT_TABLE = {
    "fillfactor": 70,
    "autovacuum_vacuum_scale_factor": 0.01,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_analyze_scale_factor": 0.02,
}
"""Storage of a table that grows for years while few of its rows change often: room on each page for the next versions
of its rows, and a vacuum long before a fifth of the table (the default) is dead."""
LARGE_TABLE = {"autovacuum_vacuum_scale_factor": 0.02, "autovacuum_vacuum_threshold": 10_000}
"""Storage of a table of which each row changes once."""
COUNTERS = {"fillfactor": 50}
"""Storage of a small table whose rows change all the time, but for their keys."""


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): ordered by time, for paging by key and for compact indexes."""
    return uuid.UUID(bytes=uuid_utils.uuid7().bytes)


LAST_ID = uuid.UUID(int=2**128 - 1)
"""Greater than any `new_id`."""


def first_id(timestamp: float) -> uuid.UUID:
    """A lower bound of all `new_id` since this time (s since 1970)."""
    return uuid.UUID(int=int(max(timestamp, 0.0) * 1000) << 80)


def one_of(column: str, words: type[StrEnum] | frozenset[Any]) -> str:
    """The condition of a CHECK that a column holds one of these words."""
    return f"{column} IN ({', '.join(sorted(repr(str(word)) for word in words))})"


def id_column() -> Mapped[uuid.UUID]:
    return mapped_column(Uuid, primary_key=True, default=new_id)


def tenant_column() -> Mapped[str]:
    return mapped_column(String(63), index=True)


def time_of_insert() -> Mapped[dt.datetime]:
    return mapped_column(DateTime(timezone=True), server_default=func.clock_timestamp())


def optional_time() -> Mapped[dt.datetime | None]:
    return mapped_column(DateTime(timezone=True))


def pipeline_column() -> Mapped[str]:
    """Which pipeline the row is of."""
    return mapped_column(String(40), default=IMAGE, server_default=IMAGE)


def task_column() -> Mapped[str]:
    """What a model is for, within its pipeline: a tenant has one champion for each task."""
    return mapped_column(String(40), default=DEFAULT_TASK, server_default=DEFAULT_TASK)


def counter() -> Mapped[int]:
    return mapped_column(Integer, server_default="0", default=0)
