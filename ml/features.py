"""The frozen backbone, computed once for each distinct picture, never with gradients.

Without augmentation every scan's features are computed once for the whole training. With augmentation the held-out
scans' are computed once, and each training scan's once an epoch, since its pixels are new each time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from ml.engines import Backbone
from ml.network import FEATURES
from ml.tensorfile import reserve
from ml.transforms import Augmentation, augment, draw

IN_MEMORY = 2**30  # bytes of kept features; beyond it they live in an unlinked temporary file


class Features:
    """Features of a dataset's scans. `pixels`: uint8 [scans, height, width, 3], an array or a map of a file."""

    def __init__(self, backbone: Backbone, pixels: np.ndarray) -> None:
        self.backbone, self._pixels = backbone, pixels
        self._tell: Callable[[int], None] = lambda count: None
        self._kept: np.ndarray | None = None
        self._known = np.zeros(len(pixels), dtype=bool)

    def on_images(self, tell: Callable[[int], None]) -> None:
        """`tell` hears how many images each batch had, as the backbone finishes it."""
        self._tell = tell

    def plain(self, scans: np.ndarray) -> np.ndarray:
        """float32 [len(scans), 25088] of the scans as they are; computed on first use, then kept."""
        return np.asarray(self.keep(scans)[scans])

    def keep(self, scans: np.ndarray) -> np.ndarray:
        """Compute what is missing of the scans' plain features, and keep it. The answer has a row for every scan."""
        if self._kept is None:
            self._kept = _store((len(self._pixels), FEATURES))
        missing = scans[~self._known[scans]]
        for rows, features in self._computed(missing, lambda rows: self._pixels[rows]):
            self._kept[missing[rows]] = features
            self._known[missing[rows]] = True
        return self._kept

    def augmented(self, scans: np.ndarray, seed: int, epoch: int, augmentation: Augmentation) -> np.ndarray:
        """float32 [len(scans), 25088] of the scans as `epoch` changes them, by seed, epoch and scan alone."""
        height, width = self._pixels.shape[1:3]

        def changed(rows: np.ndarray) -> np.ndarray:
            draws = [draw(augmentation, (seed, epoch, int(scan)), height, width) for scan in rows]
            return augment(self._pixels[rows], draws)

        result = np.empty((len(scans), FEATURES), np.float32)
        for rows, features in self._computed(scans, changed):
            result[rows] = features
        return result

    def _computed(
        self, scans: np.ndarray, pixels_of: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        # The engine asks for the next batch while two are running, so augmenting happens beside the device's work.
        size = self.backbone.batch
        batches = (pixels_of(scans[start : start + size]) for start in range(0, len(scans), size))
        done = 0
        for features in self.backbone.stream(batches):
            yield slice(done, done + len(features)), features
            done += len(features)
            self._tell(len(features))


def _store(shape: tuple[int, int]) -> np.ndarray:
    if 4 * shape[0] * shape[1] <= IN_MEMORY:
        return np.empty(shape, np.float32)  # pages are taken only when they are written
    file = tempfile.TemporaryFile(prefix="renalq-features-")  # noqa: SIM115 - the map keeps it open; unlinked already
    reserve(file.fileno(), 4 * shape[0] * shape[1])
    return np.memmap(file, np.float32, "w+", shape=shape)
