"""Batches of deletions: how many rows go in one transaction, which are old enough, in which order they are deleted."""

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from jobs.db import NOW, seconds
from jobs.tables.columns import first_id

ROWS = 2000
"""Rows per transaction: locks are held for fractions of a second."""
DAY_SECONDS = 24 * 3600.0
_CLOCK_ERROR_SECONDS = DAY_SECONDS


def older_than(column: Any, days: float) -> ColumnElement[bool]:
    """SQL: the time was more than so many days ago."""
    # now(), not clock_timestamp(): only a stable value can be searched for in an index.
    older: ColumnElement[bool] = column < func.now() - seconds(days * DAY_SECONDS)
    return older


def id_bound(session: Session, days: float) -> uuid.UUID:
    """An id that all rows made more than `days` ago are below, since ids are ordered by time (UUIDv7).

    It only limits a search: the id is of its writer's clock, which may be wrong. Postgres' clock decides.
    """
    before = session.scalars(select(NOW - seconds(days * DAY_SECONDS))).one()
    return first_id(before.timestamp() + _CLOCK_ERROR_SECONDS)


def delete_some(
    session: Session,
    key: tuple[InstrumentedAttribute[Any], ...],
    owners: Sequence[uuid.UUID],
    rows: int,
    *which: ColumnElement[bool],
) -> int:
    """Delete up to `rows` rows of these jobs (or model versions) in the order of the key, which begins with the owner.
    Returns how many."""
    some = select(*key).where(key[0].in_(owners), *which).order_by(*key).limit(rows)
    gone = delete(key[0].class_).where(tuple_(*key).in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]
