"""OOM fallback: once the device runs out of memory, batches are halved. A second time is a failure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ml.image.engines.engine import Engine
from ml.runtime.errors import DeviceOutOfMemory, is_out_of_memory

log = logging.getLogger("ml")


class OomFallbackEngine:
    """Wraps an engine (see `ml.image.engines.engine.Engine`); callers do not notice that batches are halved."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.batch, self.streams = engine.name, engine.batch, engine.streams
        self._engine = engine
        self._max_batch: int | None = None  # images, once a batch did not fit

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Engine.stream`: one output per batch, in order, also if a batch was split.

        Raises:
            DeviceOutOfMemory: half a batch does not fit either, or the batch is a single image.
        """
        source = _Source(batches)
        while True:
            try:
                yield from self._outputs(source)
                return
            except Exception as error:
                if source.failed or not is_out_of_memory(error):
                    raise
                self._halve(source, error)
            if torch.cuda.is_available():  # only here the error, and with it the tensors in its frames, is gone
                torch.cuda.empty_cache()

    def _halve(self, source: _Source, error: Exception) -> None:
        largest = max(map(len, source.unfinished), default=1)
        if self._max_batch is not None or largest == 1:
            raise DeviceOutOfMemory from error
        self._max_batch = (largest + 1) // 2
        log.warning("The device ran out of memory: from now on at most %d images at once.", self._max_batch)

    def _outputs(self, source: _Source) -> Iterator[np.ndarray]:
        parts: list[np.ndarray] = []
        for features in self._engine.stream(self._split(source)):
            parts.append(features)
            if sum(map(len, parts)) == len(source.unfinished[0]):
                source.unfinished.popleft()
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts = []

    def _split(self, source: _Source) -> Iterator[np.ndarray]:
        for batch in source.batches():
            size = self._max_batch or len(batch)
            yield from (batch[start : start + size] for start in range(0, len(batch), size))


class _Source:
    """The caller's batches. Those without an output yet are kept, so that they can be computed again."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = iter(batches)
        self.unfinished: deque[np.ndarray] = deque()
        self.failed = False  # the caller's iterator raised, so it cannot be continued

    def batches(self) -> Iterator[np.ndarray]:
        yield from tuple(self.unfinished)
        try:
            for batch in self._batches:
                self.unfinished.append(batch)
                yield batch
        except GeneratorExit:
            raise
        except BaseException:
            self.failed = True
            raise
