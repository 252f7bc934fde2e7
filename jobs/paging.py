"""Pages of rows by key, not by offset: rows that arrive meanwhile shift nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows. `next` is the `after` of the page that follows, null on the last one."""

    data: Sequence[T]
    has_more: bool
    next: str | None


def page(rows: Sequence[T], limit: int, key: Any) -> Page[T]:
    """A page of `limit` rows out of `limit + 1` that were asked for: the last one says only that there are more."""
    kept = rows[:limit]
    more = len(rows) > limit
    return Page(kept, more, str(key(kept[-1])) if more else None)
