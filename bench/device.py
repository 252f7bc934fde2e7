"""How near the engines come to what the device and the input can do: `python -m bench.device`.

engine    frozen VGG16 on pictures in memory, images a second, and its share of the ceiling
ceiling   what the device reaches in one large bf16 product by torch (fp32 where it has no bf16): 2 n³ operations
input     JPEG files decoded and resized in threads; pictures augmented: images a second that could be fed

On a machine with a GPU these are the GPU's figures, else the CPU's. Prints a table, writes bench/out/device.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.predict import make_scans
from bench.train import ROOT, machine
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import outputs_of
from ml.image.engines.hardware import device_has_bf16, training_device
from ml.image.networks import network
from ml.image.networks.architectures import ARCHITECTURES, cut
from ml.image.pixels.augmentation import Augment
from ml.image.pixels.decoding import decode
from ml.image.pixels.transforms import Transform
from ml.runtime.prefetch import prefetch

OUT = ROOT / "bench" / "out" / "device.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    transform = Transform()
    below, _ = cut(network.build(2, seed=0).eval(), ARCHITECTURES["vgg16"], 0)
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as folder:
        paths = make_scans(Path(folder) / "scans", parsed.scans)
        decoded = per_second(
            parsed.scans, lambda: list(prefetch(lambda p: transform.resize(decode(p)), paths, _cores()))
        )
        pictures = np.stack([transform.resize(decode(path)) for path in paths])
    engine = open_engine(below, transform)
    outputs_of(engine, pictures[: 2 * engine.batch])
    speed = per_second(parsed.scans, lambda: outputs_of(engine, pictures))
    scans = np.arange(parsed.scans)
    augmented = per_second(parsed.scans, lambda: _augmented(pictures, scans))
    operations, most = 2 * products_of(below, transform), ceiling(parsed.side)
    results = {
        "machine": machine(),
        "engine": engine.name,
        "images_per_second": round(speed, 1),
        "operations_per_image": operations,
        "ceiling_operations_per_second": round(most),
        "share_of_ceiling": round(speed * operations / most, 3),
        "decoded_per_second": round(decoded, 1),
        "augmented_per_second": round(augmented, 1),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("what", "figure", title="Frozen VGG16, 224 × 224")
    for name, value in results.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=2048 if torch.cuda.is_available() else 128)
    parser.add_argument("--side", type=int, default=8192 if torch.cuda.is_available() else 2048, help="of the product")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _augmented(pictures: np.ndarray, scans: np.ndarray) -> None:
    augment = Augment("document", seed=0, epoch=1)
    for start in range(0, len(scans), 32):
        some = scans[start : start + 32]
        augment(pictures[some], some, np.zeros(len(some), np.int64))


def per_second(count: int, work: Callable[[], object], rounds: int = 3) -> float:
    """Median of some rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return count / median(taken)


def ceiling(side: int) -> float:
    """Operations a second of one square product, the best of ten."""
    form = torch.bfloat16 if device_has_bf16() else torch.float32
    one, other = (torch.randn(side, side, device=training_device()).to(form) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


@torch.inference_mode()
def products_of(layers: nn.Sequential, transform: Transform) -> int:
    """Multiplications that one picture takes, counted at the convolutions."""
    found = 0

    def count(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal found
        assert isinstance(layer, nn.Conv2d)
        found += output[0].numel() * layer.weight[0].numel()

    hooks = [one.register_forward_hook(count) for one in layers.modules() if isinstance(one, nn.Conv2d)]
    layers(torch.zeros(1, 3, transform.height, transform.width))
    for hook in hooks:
        hook.remove()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
