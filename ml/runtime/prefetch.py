"""Prefetching: work in threads ahead of its consumer, in order and in bounded memory; and batching."""

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
    """`map(work, items)` in threads, in order, with at most `depth` results in memory.

    Threads help because Pillow, zlib and hashlib release the GIL.
    """
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
    """Lists of at most `size` items, for a device that computes `streams` batches at the same time.

    The remainder at the end is divided evenly, so that all streams are busy.
    """
    for round_ in batched(items, size * streams):
        yield from batched(round_, -(-len(round_) // streams))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last one may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
