"""The protocol of engines: uint8 pixels in, float32 features or logits out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import numpy as np

Dtype = Literal["fp32", "bf16", "int8"]
"""In which products are computed."""
Precision = Literal["auto", "fp32", "bf16", "int8"]
"""A requested dtype, or auto."""


class Engine(Protocol):
    """Computes features or logits from pixels, without gradients.

    `name`: backend and dtype, such as openvino-bf16. `batch`: the preferred batch size; larger ones are no faster.
    `streams`: the number of batches that it computes at the same time.
    """

    name: str
    batch: int
    streams: int

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Batches uint8 [n, height, width, 3], where n may vary → float32 [n, …], in the same order."""
        ...


def outputs_of(engine: Engine, images: np.ndarray) -> np.ndarray:
    """The outputs of an array of images: uint8 [N, height, width, 3] → float32 [N, …]."""
    size = engine.batch
    batches = (images[start : start + size] for start in range(0, len(images), size))
    return np.concatenate(list(engine.stream(batches)))
