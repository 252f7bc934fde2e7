"""What an engine is: uint8 pixels in, float32 out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import numpy as np

Dtype = Literal["fp32", "bf16", "int8"]
"""What the products are computed in."""


Precision = Literal["auto", "fp32", "bf16", "int8"]


class Engine(Protocol):
    """Pixels to features or logits, never with gradients. `batch`: how many images it likes at once; more is no faster.

    `name`: where it runs and in what form, such as openvino-bf16. `streams`: batches that it takes at the same time.
    """

    name: str
    batch: int
    streams: int

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, 3] batches (n may differ) → float32 [n, …], in the same order."""
        ...


def outputs_of(engine: Engine, images: np.ndarray) -> np.ndarray:
    """Outputs of images that are all at hand: uint8 [N, height, width, 3] → float32 [N, …]."""
    size = engine.batch
    batches = (images[start : start + size] for start in range(0, len(images), size))
    return np.concatenate(list(engine.stream(batches)))
