"""The order and batches of an epoch's scans, and how many of their features are in memory at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ml.image.engines.features import Features
from ml.image.pixels.augmentation import Augment
from ml.spec.image import Params

WINDOW = 2048  # training scans whose features are in memory at once; 205 MB if they are 25088 numbers each
FINE_TUNE_WINDOW = 512  # with unfrozen blocks, where a scan has up to 800,000 features (VGG16's second block: 3.2 MB)


class Sampler:
    """The training scans of each epoch, int64 indices into the dataset; a function of seed and epoch."""

    def __init__(self, params: Params, train: np.ndarray, labels: np.ndarray, window: int = WINDOW) -> None:
        self._params, self._train = params, train
        self._probabilities = _balanced_probabilities(labels[train]) if params.balance == "sampler" else None
        size = params.batch_size * params.accumulate
        self._window = max(1, window // size) * size  # whole steps
        self.count = len(train)

    @property
    def one_window(self) -> bool:
        """Whether one window is enough for the whole training: features never change, and fit into one window."""
        return self._params.augmentation is False and len(self._train) <= self._window

    def windows(self, epoch: int) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """An epoch as windows: (scans, batches of rows of the window).

        Without augmentation a small dataset is one window, which stays the same; only its batches change.
        """
        order = self._order(epoch)
        if self.one_window:
            yield self._train, self._batches(order)
            return
        for start in range(0, len(order), self._window):
            scans = self._train[order[start : start + self._window]]
            yield scans, self._batches(np.arange(len(scans)))

    def features(self, features: Features, scans: np.ndarray, epoch: int) -> np.ndarray:
        """Features of a window, float32 [len(scans), …]; augmented for this epoch if the parameters say so."""
        params = self._params
        if params.augmentation is False:
            return features.plain(scans)
        kind = "randaugment" if params.augmentation == "randaugment" else "document"
        return features.augmented(scans, Augment(kind, params.seed, epoch, params.horizontal_flip))  # type: ignore[arg-type]

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self._params.seed, epoch))
        if self._probabilities is None:
            return random.permutation(len(self._train))
        return random.choice(len(self._train), size=len(self._train), p=self._probabilities)

    def _batches(self, rows: np.ndarray) -> list[torch.Tensor]:
        size = self._params.batch_size
        return [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]


def _balanced_probabilities(labels: np.ndarray) -> np.ndarray:
    """The probability of drawing each scan, such that all classes are drawn equally often."""
    probabilities: np.ndarray = (1 / np.bincount(labels))[labels]
    probabilities /= probabilities.sum()
    return probabilities
