"""Features of the frozen backbone, computed once per distinct picture, without gradients.

Without augmentation, each scan's features are computed once per training, or taken from the disk cache
(ml.runtime.cache). With augmentation, those of validation and test scans are computed once and those of training scans
once per epoch, since their pixels change. DDP workers compute a share each.
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

IN_MEMORY = 2**30  # bytes of kept features; larger ones are stored in an unlinked temporary file


class Features:
    """Features of a dataset's scans. `pixels`: uint8 [scans, height, width, 3], an array or a map of a file."""

    def __init__(
        self, engine: Engine, pixels: np.ndarray, group: ProcessGroup = SINGLE_PROCESS, cached: Cached | None = None
    ) -> None:
        self.engine, self._pixels, self._group, self._cached = engine, pixels, group, cached
        self._on_images: Callable[[int], None] = lambda count: None
        self._kept: np.ndarray | None = None
        self._known = np.zeros(len(pixels), dtype=bool)
        self._load_cached()

    def on_images(self, callback: Callable[[int], None]) -> None:
        """`callback` is called with the number of images of each batch that the engine finishes."""
        self._on_images = callback

    def plain(self, scans: np.ndarray) -> np.ndarray:
        """Features of unchanged scans: float32 [len(scans), …]; computed on first use, then kept."""
        return np.asarray(self.keep(scans)[scans])

    def keep(self, scans: np.ndarray) -> np.ndarray:
        """Compute missing features of unchanged scans, and keep them. Returns an array with a row for every scan."""
        missing = np.unique(scans[~self._known[scans]])
        if len(missing):
            for rows, features in self._compute(missing, lambda rows: self._pixels[rows]):
                self._kept_array(features.shape[1:])[missing[rows]] = features
            self._known[missing] = True
        assert self._kept is not None, "scans must not be empty"
        return self._kept

    def missing(self, scans: np.ndarray) -> int:
        """How many of these scans have no features yet."""
        return int((~self._known[np.unique(scans)]).sum())

    def store_in_cache(self) -> None:
        """Store the features of unchanged scans in the cache, for the next training on them."""
        if self._cached is not None and self._kept is not None and self._group.is_leader:
            self._cached.store(self._kept, self._known)

    def augmented(self, scans: np.ndarray, augment: Augment) -> np.ndarray:
        """Features of augmented scans: float32 [len(scans), …]. Repeated scans are augmented differently each time."""

        def augmented(rows: np.ndarray) -> np.ndarray:
            return augment(self._pixels[scans[rows]], scans[rows], repetitions(scans)[rows])

        result: np.ndarray | None = None
        for rows, features in self._compute(np.arange(len(scans)), augmented):
            result = np.empty((len(scans), *features.shape[1:]), np.float32) if result is None else result
            result[rows] = features
        assert result is not None, "scans must not be empty"
        return result

    def _compute(
        self, rows: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        if self._group.size == 1:
            yield from self._stream(rows, pixels_of)
            return
        share = [features for _, features in self._stream(self._group.rows_to_compute(rows), pixels_of)]
        yield slice(0, len(rows)), self._group.gather_rows(np.concatenate(share), len(rows))

    def _stream(
        self, rows: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        # The engine takes the next batch while two are running, so augmentation overlaps with the device's work.
        size, done = self.engine.batch, 0
        batches = (pixels_of(rows[start : start + size]) for start in range(0, len(rows), size))
        for features in self.engine.stream(batches):
            yield slice(done, done + len(features)), features
            done += len(features)
            self._on_images(len(features) * self._group.size)

    def _kept_array(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._kept is None:
            self._kept = _allocate((len(self._pixels), *shape))
        return self._kept

    def _load_cached(self) -> None:
        # Members of a team must know the same, or one would wait for shares that another does not compute.
        entry = self._group.broadcast(self._cached.entry() if self._cached is not None else None)
        found = read_features(entry) if entry is not None else None
        if found is not None and found[1].shape != self._known.shape:
            found = None
        known = self._group.all_true(self._known if found is None else found[1])
        if found is not None and known.any():
            self._known = known.copy()
            self._kept_array(found[0].shape[1:])[known] = found[0][known]


def repetitions(scans: np.ndarray) -> np.ndarray:
    """How often each scan (or any other number) occurs before its position: int64 [len(scans)]."""
    order = np.argsort(scans, kind="stable")
    first = np.searchsorted(scans[order], scans[order])
    repetitions = np.empty(len(scans), np.int64)
    repetitions[order] = np.arange(len(scans)) - first
    return repetitions


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    if size <= IN_MEMORY:
        return np.empty(shape, np.float32)  # memory pages are only allocated when they are written
    file = tempfile.TemporaryFile(prefix="renalq-features-")  # noqa: SIM115 - the map keeps it open; unlinked already
    reserve(file.fileno(), size)
    return np.memmap(file, np.float32, "w+", shape=shape)
