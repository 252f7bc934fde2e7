"""Work in threads ahead of whoever consumes it: in order, and never more than `depth` results in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = 2, depth: int = 32
) -> Iterator[Result]:
    """`map(work, items)` in threads, in order. Pillow, zlib and hashlib let go of the GIL, so threads do help."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    pending: deque[Future[Result]] = deque()
    try:
        source = iter(items)
        pending.extend(pool.submit(work, item) for item in islice(source, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batched_for_streams(items: Iterable[Item], size: int, streams: int) -> Iterator[list[Item]]:
    """Lists of `size` items, for a device that takes so many `streams` of them at the same time. What is left at the
    end is shared evenly: one stream does not work for two while the other has nothing."""
    for some in batched(items, size * streams):
        yield from batched(some, -(-len(some) // streams))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
