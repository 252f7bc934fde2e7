"""An engine whose device runs out of memory gets half batches from then on. Once: a second time is a failure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ml.runtime.errors import DeviceOutOfMemory, is_out_of_memory

if TYPE_CHECKING:
    from ml.image.engines.engine import Engine

log = logging.getLogger("ml")


class OomFallbackEngine:
    """An engine (see `ml.image.engines.backends.Engine`) around another. Who streams through it sees nothing of the
    halving."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.batch, self.streams = engine.name, engine.batch, engine.streams
        self._engine = engine
        self._most: int | None = None  # images in a batch, once the device has refused one

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Engine.stream`: one answer for each batch, in order, also where it went through in parts.

        Raises:
            DeviceOutOfMemory: half a batch is too much as well, or the batch is one image.
        """
        source = _Source(batches)
        while True:
            try:
                yield from self._answers(source)
                return
            except Exception as error:
                if source.failed or not is_out_of_memory(error):
                    raise
                self._halve(source, error)
            if torch.cuda.is_available():  # here the error, and with it the tensors of its frames, is gone
                torch.cuda.empty_cache()

    def _halve(self, source: _Source, error: Exception) -> None:
        largest = max(map(len, source.unanswered), default=1)
        if self._most is not None or largest == 1:
            raise DeviceOutOfMemory from error
        self._most = (largest + 1) // 2
        log.warning("The device ran out of memory: from now on at most %d images at once.", self._most)

    def _answers(self, source: _Source) -> Iterator[np.ndarray]:
        parts: list[np.ndarray] = []
        for features in self._engine.stream(self._pieces(source)):
            parts.append(features)
            if sum(map(len, parts)) == len(source.unanswered[0]):
                source.unanswered.popleft()
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts = []

    def _pieces(self, source: _Source) -> Iterator[np.ndarray]:
        for batch in source.batches():
            size = self._most or len(batch)
            yield from (batch[start : start + size] for start in range(0, len(batch), size))


class _Source:
    """The caller's batches: those that were taken stay here until they are answered, so that they can go again."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._fresh = iter(batches)
        self.unanswered: deque[np.ndarray] = deque()
        self.failed = False  # the caller's own iterator raised: it is over then, and nothing of it can go again

    def batches(self) -> Iterator[np.ndarray]:
        yield from tuple(self.unanswered)
        try:
            for batch in self._fresh:
                self.unanswered.append(batch)
                yield batch
        except GeneratorExit:
            raise
        except BaseException:
            self.failed = True
            raise
