"""Trainings of a head on features that are computed once, and what their scores say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench.fewshot.data import Scans
from ml.image.dataset.splits import Split
from ml.image.engines.backends import open_engine, training_precision
from ml.image.engines.features import Features
from ml.image.learning.train import TrainConfig, TrainData, train
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.pixels.transforms import Transform
from ml.runtime.cache import Cache, Cached, key_of
from ml.runtime.config import parse_params
from ml.spec.image import Params

STEPS = 150
"""Steps of the optimizer in each training, whatever the number of scans."""
BATCH = 16
ALPHA = 0.05
CACHE, CACHE_BYTES = Path(__file__).resolve().parents[1] / "out" / "cache", 2 * 2**30
"""Features take minutes on a CPU: the next run has them. `make clean` removes them."""


@dataclass(frozen=True)
class Point:
    """Accuracy on the held-out scans of `draws` trainings, each with other scans to learn from and another head."""

    per_class: int
    accuracy: dict[str, list[float]]

    @property
    def gains(self) -> list[float]:
        """ImageNet's accuracy less random's, draw by draw."""
        pairs = zip(self.accuracy["imagenet"], self.accuracy["none"], strict=True)
        return [one - other for one, other in pairs]

    @property
    def verdict(self) -> str:
        """By the sign test over draws, two-sided; "cannot tell" where it does not reach 5 %."""
        better, worse = sum(gain > 0 for gain in self.gains), sum(gain < 0 for gain in self.gains)
        pairs = better + worse
        extreme = sum(math.comb(pairs, k) for k in range(max(better, worse), pairs + 1))
        if pairs == 0 or 2 * extreme / 2**pairs > ALPHA:
            return "cannot tell"
        return "imagenet is better" if better > worse else "random is better"


def features_of(scans: Scans, transform: Transform, params: Params, weights: Path | None) -> Features:
    """Of all scans, below the head; `weights`: ImageNet's, or None for random ones."""
    model = _model(scans, transform, params)
    if weights is not None:
        network.load_published_weights(model.network, ARCHITECTURES[model.architecture], weights, False)
    below, _ = model.cut()
    engine = open_engine(below, transform, training_precision(params))
    known = [scan.sha256 for scan in scans.report.scans]
    key = key_of(scans=known, weights=weights and weights.name, head=model.head, transform=transform.as_dict(),
                 engine=engine.name)  # fmt: skip
    found = Features(engine, scans.pixels, cached=Cached(Cache(CACHE, CACHE_BYTES), key))
    found.keep(np.concatenate([scans.pool, scans.test]))
    found.store_in_cache()
    return found


def points(
    scans: Scans, transform: Transform, features: dict[str, Features], sizes: list[int], draws: int, head: str
) -> Iterator[Point]:
    """One point of the curve after the other; sizes that the pool cannot give are left out."""
    for count in sizes:
        drawn = [scans.draw(count, seed) for seed in range(draws)]
        chosen = [one for one in drawn if one is not None]
        if chosen:
            yield Point(count, {
                weights: [_accuracy(scans, transform, known, one, params_of(head, weights, len(one), seed))
                          for seed, one in enumerate(chosen)]
                for weights, known in features.items()
            })  # fmt: skip


def params_of(head: str, weights: str, scans: int, seed: int) -> Params:
    """The same for both sides, but for `weights`. The last epoch is kept, so that nothing is chosen by the test."""
    epochs = max(1, round(STEPS / math.ceil(scans / BATCH)))
    return parse_params(
        {"weights": weights, "head": head, "epochs": epochs, "batch_size": BATCH, "learning_rate": 0.01, "seed": seed}
        | {"augmentation": False, "keep": "last", "schedule": "cosine", "standardize": True}
    )


def _model(scans: Scans, transform: Transform, params: Params) -> Model:
    classes, head = scans.report.names, params.head_kind
    built = network.build(len(classes), params.seed, params.network, head, params.dropout)
    return Model(built, classes, transform, {}, params.network, head)


def _accuracy(scans: Scans, transform: Transform, features: Features, chosen: np.ndarray, params: Params) -> float:
    # The test scans stand where validation scans do: nothing is chosen by them, and each epoch is scored on them.
    data = TrainData(lambda top: features, scans.report.labels, Split(chosen, scans.test, scans.test))
    *_, last = train(TrainConfig(_model(scans, transform, params), params), data)
    return last.val_accuracy


def middle_and_spread(values: list[float]) -> str:
    """Median, least and largest."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
