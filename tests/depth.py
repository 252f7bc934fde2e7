"""How much the tests do: a part for each change (`make test`), or everything (`make test-all`: RENALQ_TESTS=all)."""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ALL = os.environ.get("RENALQ_TESTS") == "all"


def depth(some: T, everything: T) -> T:
    """What `make test` takes, and what `make test-all` does."""
    return everything if ALL else some


def rest_in_full(every: Iterable[Any], light: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test: `make test` takes those that are light, and `make test-all` the others too."""
    return [one if light(one) else pytest.param(*_values(one), marks=pytest.mark.full) for one in every]


def _values(one: Any) -> tuple[Any, ...]:
    return one if isinstance(one, tuple) else (one,)
