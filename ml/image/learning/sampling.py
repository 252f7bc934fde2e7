"""In which order an epoch sees its scans, in which batches, and how many of their features are in memory at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ml.image.engines.features import Features
from ml.image.pixels.augmentation import Augment
from ml.spec.image import Params

WINDOW = 2048  # most training scans whose features are in memory at once, where they are 25088 numbers (205 MB)
FINE_TUNE_WINDOW = 512  # with unfrozen blocks, where a scan's are up to 800,000 (VGG16's second block: 3.2 MB)


class Sampler:
    """The training scans (int64 indices into a dataset) of each epoch, by seed and epoch alone."""

    def __init__(self, params: Params, train: np.ndarray, labels: np.ndarray, window: int = WINDOW) -> None:
        self._params, self._train = params, train
        self._chances = _balanced(labels[train]) if params.balance == "sampler" else None
        size = params.batch_size * params.accumulate
        self._window = max(1, window // size) * size  # whole steps
        self.count = len(train)

    @property
    def one_window(self) -> bool:
        """Whether one window serves the whole training: the features are the same in each epoch, and few enough."""
        return self._params.augmentation is False and len(self._train) <= self._window

    def windows(self, epoch: int) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """An epoch as windows of (scans, batches of rows of that window).

        Without augmentation a small dataset is one window that stays the same in every epoch: only its batches change.
        """
        order = self._order(epoch)
        if self.one_window:
            yield self._train, self._batches(order)
            return
        for start in range(0, len(order), self._window):
            scans = self._train[order[start : start + self._window]]
            yield scans, self._batches(np.arange(len(scans)))

    def features(self, features: Features, scans: np.ndarray, epoch: int) -> np.ndarray:
        """float32 [len(scans), …] of a window, augmented anew for this epoch where the parameters say so."""
        params = self._params
        if params.augmentation is False:
            return features.plain(scans)
        kind = "randaugment" if params.augmentation == "randaugment" else "document"
        return features.augmented(scans, Augment(kind, params.seed, epoch, params.horizontal_flip))  # type: ignore[arg-type]

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self._params.seed, epoch))
        if self._chances is None:
            return random.permutation(len(self._train))
        return random.choice(len(self._train), size=len(self._train), p=self._chances)

    def _batches(self, rows: np.ndarray) -> list[torch.Tensor]:
        size = self._params.batch_size
        return [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]


def _balanced(labels: np.ndarray) -> np.ndarray:
    """Each scan's chance, so that all classes are drawn equally often."""
    chances: np.ndarray = (1 / np.bincount(labels))[labels]
    chances /= chances.sum()
    return chances
