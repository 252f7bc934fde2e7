"""In one process, without any queue: `python -m bench.peers.serving.alone WAY FOLDER COUNT`. The last line is the
figures.

cold      the network is loaded for each scan, as document 000 has it
warm      it stays loaded; one scan after the other through torch, fp32
ceiling   the fastest engine that the model is admitted for, on pictures that are in memory already
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ml.image.engines.admission import choose_dtype, whole_network
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import outputs_of
from ml.image.networks import network
from ml.image.pixels.decoding import decode

MODEL = Path(os.environ["BENCH_MODEL"])


def cold(paths: list[Path]) -> None:
    """Load, look, forget."""
    for path in paths:
        _one(network.load(MODEL), path)


def warm(paths: list[Path]) -> None:
    """Look."""
    model = network.load(MODEL)
    for path in paths:
        _one(model, path)


@torch.inference_mode()
def _one(model: network.Model, path: Path) -> None:
    picture = torch.from_numpy(model.transform.resize(decode(path)).copy())[None]
    model.network.eval()(model.transform.normalize(picture)).softmax(1)


def timed(way: Callable[[list[Path]], None], paths: list[Path]) -> float:
    """Seconds, after a first scan that warms everything up."""
    way(paths[:1])
    started = time.perf_counter()
    way(paths[1:])
    return time.perf_counter() - started


def ceiling(paths: list[Path]) -> float:
    """Seconds of the engine alone."""
    model = network.load(MODEL)
    pictures = np.stack([model.transform.resize(decode(path)) for path in paths])
    engine = open_engine(
        whole_network(model), model.transform, choose_dtype(model.metadata), model.metadata.get("ranges")
    )
    outputs_of(engine, pictures[: 4 * engine.batch])
    started = time.perf_counter()
    outputs_of(engine, pictures)
    return time.perf_counter() - started


def main(way: str, folder: str, count: str) -> None:
    """Print scans and seconds."""
    paths = sorted(Path(folder).iterdir())[: int(count)]
    if way == "ceiling":
        scans, seconds = len(paths), ceiling(paths)
    else:
        scans, seconds = len(paths) - 1, timed({"cold": cold, "warm": warm}[way], paths)
    print(json.dumps({"scans": scans, "seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
