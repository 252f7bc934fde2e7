"""The frozen backbone, computed once for each distinct picture, never with gradients.

Without augmentation every scan's features are computed once for the whole training, and not even that where a cache on
disk has them (ml.runtime.cache). With augmentation those of validation and test scans are computed once, and each
training scan's once an epoch, since its pixels are new each time. Of processes that train together each computes its
share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from ml.image.engines.engine import Engine
from ml.image.pixels.augmentation import Augment
from ml.runtime.cache import Cached, read_features
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.runtime.tensorfile import reserve

IN_MEMORY = 2**30  # bytes of kept features; beyond it they live in an unlinked temporary file


class Features:
    """Features of a dataset's scans. `pixels`: uint8 [scans, height, width, 3], an array or a map of a file."""

    def __init__(
        self, engine: Engine, pixels: np.ndarray, group: ProcessGroup = SINGLE_PROCESS, cached: Cached | None = None
    ) -> None:
        self.engine, self._pixels, self._group, self._cached = engine, pixels, group, cached
        self._tell: Callable[[int], None] = lambda count: None
        self._kept: np.ndarray | None = None
        self._known = np.zeros(len(pixels), dtype=bool)
        self._recall()

    def on_images(self, tell: Callable[[int], None]) -> None:
        """`tell` hears how many images each batch had, as the engine finishes it."""
        self._tell = tell

    def plain(self, scans: np.ndarray) -> np.ndarray:
        """float32 [len(scans), …] of the scans as they are; computed on first use, then kept."""
        return np.asarray(self.keep(scans)[scans])

    def keep(self, scans: np.ndarray) -> np.ndarray:
        """Compute what is missing of the scans' plain features, and keep it. The answer has a row for every scan."""
        missing = np.unique(scans[~self._known[scans]])
        if len(missing):
            for rows, features in self._computed(missing, lambda rows: self._pixels[rows]):
                self._room(features.shape[1:])[missing[rows]] = features
            self._known[missing] = True
        assert self._kept is not None, "at least one scan is asked for"
        return self._kept

    def remember(self) -> None:
        """Leave the plain features in the cache, for the next training of these scans."""
        if self._cached is not None and self._kept is not None and self._group.is_leader:
            self._cached.store(self._kept, self._known)

    def augmented(self, scans: np.ndarray, augment: Augment) -> np.ndarray:
        """float32 [len(scans), …] of the scans as `augment` changes them; a scan that stands there twice is changed
        twice."""

        def changed(places: np.ndarray) -> np.ndarray:
            return augment(self._pixels[scans[places]], scans[places], _turns(scans)[places])

        result: np.ndarray | None = None
        for places, features in self._computed(np.arange(len(scans)), changed):
            result = np.empty((len(scans), *features.shape[1:]), np.float32) if result is None else result
            result[places] = features
        assert result is not None, "at least one scan is asked for"
        return result

    def _computed(
        self, rows: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        if self._group.size == 1:
            yield from self._streamed(rows, pixels_of)
            return
        share = [features for _, features in self._streamed(self._group.rows_to_compute(rows), pixels_of)]
        yield slice(0, len(rows)), self._group.gather_rows(np.concatenate(share), len(rows))

    def _streamed(
        self, rows: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        # The engine asks for the next batch while two are running, so augmenting happens beside the device's work.
        size, done = self.engine.batch, 0
        batches = (pixels_of(rows[start : start + size]) for start in range(0, len(rows), size))
        for features in self.engine.stream(batches):
            yield slice(done, done + len(features)), features
            done += len(features)
            self._tell(len(features) * self._group.size)

    def _room(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._kept is None:
            self._kept = _store((len(self._pixels), *shape))
        return self._kept

    def _recall(self) -> None:
        # Members of a team must know the same, or one would wait for shares that another does not compute.
        entry = self._group.broadcast(self._cached.entry() if self._cached is not None else None)
        found = read_features(entry) if entry is not None else None
        if found is not None and found[1].shape != self._known.shape:
            found = None
        known = self._group.all_true(self._known if found is None else found[1])
        if found is not None and known.any():
            self._known = known.copy()
            self._room(found[0].shape[1:])[known] = found[0][known]


def _turns(scans: np.ndarray) -> np.ndarray:
    """How often each scan stood before its place already: int64 [len(scans)]."""
    order = np.argsort(scans, kind="stable")
    first = np.searchsorted(scans[order], scans[order])
    turns = np.empty(len(scans), np.int64)
    turns[order] = np.arange(len(scans)) - first
    return turns


def _store(shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    if size <= IN_MEMORY:
        return np.empty(shape, np.float32)  # pages are taken only when they are written
    file = tempfile.TemporaryFile(prefix="renalq-features-")  # noqa: SIM115 - the map keeps it open; unlinked already
    reserve(file.fileno(), size)
    return np.memmap(file, np.float32, "w+", shape=shape)
