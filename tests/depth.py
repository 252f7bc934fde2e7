"""How much the tests do: a part for each change (`make test`), or everything (`make test-all`: RENALQ_TESTS=all)."""

import os
from typing import TypeVar

T = TypeVar("T")
ALL = os.environ.get("RENALQ_TESTS") == "all"


def depth(some: T, everything: T) -> T:
    """What `make test` takes, and what `make test-all` does."""
    return everything if ALL else some
