"""Keyset pagination: new rows do not shift pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A page of rows. `next` is the `after` of the next page, None on the last one."""

    data: Sequence[T]
    has_more: bool
    next: str | None


def page(rows: Sequence[T], limit: int, key: Any) -> Page[T]:
    """A page of `limit` rows, given a query of `limit + 1` rows: the extra row only tells that there are more."""
    kept = rows[:limit]
    more = len(rows) > limit
    return Page(kept, more, str(key(kept[-1])) if more else None)
