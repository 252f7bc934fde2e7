"""How near the engines come to what the device and the input can do: `python -m bench.device`.

engine    frozen VGG16 on pictures in memory, images a second, and its share of the ceiling
ceiling   the most that the device was seen to do in the engine's dtype: the best of matrix products and convolutions of
          several shapes, by torch with each number of threads and by the engine's own backend (2 operations for each
          multiplication of a direct convolution). A network is never better than its best layer, so shares are below 1.
input     JPEG files decoded and resized in threads; pictures augmented: images a second that could be fed

On a machine with a GPU these are the GPU's figures, else the CPU's. Prints a table, writes bench/out/device.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.predict import make_scans
from bench.train import ROOT, machine
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import Precision, outputs_of
from ml.image.engines.hardware import training_device
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
    operations, seen = 2 * products_of(below, transform), rates(engine.name.rpartition("-")[2], parsed.side)
    best = max(seen, key=seen.__getitem__)
    results = {
        "machine": machine(),
        "engine": engine.name,
        "images_per_second": round(speed, 1),
        "operations_per_image": operations,
        "operations_per_second": round(speed * operations),
        "ceiling_operations_per_second": round(seen[best]),
        "ceiling_is": best,
        "share_of_ceiling": round(speed * operations / seen[best], 3),
        "seen_operations_per_second": {name: round(rate) for name, rate in seen.items()},
        "decoded_per_second": round(decoded, 1),
        "augmented_per_second": round(augmented, 1),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("what", "figure", title="Frozen VGG16, 224 × 224")
    for name, value in results.items():
        if name != "seen_operations_per_second":
            table.add_row(name.replace("_", " "), str(value))
    for name, rate in sorted(seen.items(), key=lambda one: -one[1]):
        table.add_row(name, f"{rate / 1e9:.0f} · 10⁹ operations a second, {rate / seen[best]:.2f} of the ceiling")
    Console().print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=2048 if torch.cuda.is_available() else 128)
    parser.add_argument(
        "--side", type=int, default=8192 if torch.cuda.is_available() else 2048, help="of the largest product"
    )
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


CONVOLUTIONS = ((112, 128), (56, 256), (28, 512), (14, 512))
"""Side of the maps, and channels in and out, of convolutions of 3 × 3: VGG16's, without its first layers."""
ROUNDS = 6


def rates(dtype: str, side: int) -> dict[str, float]:
    """Operations a second that the device did in this dtype, by what it did."""
    form, found = torch.bfloat16 if dtype == "bf16" else torch.float32, dict[str, float]()
    before = torch.get_num_threads()
    for threads in (before,) if training_device().type == "cuda" else range(1, _cores() + 1):
        torch.set_num_threads(threads)
        for name, rate in _torch_rates(form, side):
            found[f"torch {dtype}, {threads} threads, {name}"] = rate
    torch.set_num_threads(before)
    for pixels, channels in CONVOLUTIONS:
        name, rate = _engine_rate(pixels, channels, dtype)
        found[f"{name}, convolutions of {channels} maps of {pixels}²"] = rate
    return found


@torch.inference_mode()
def _torch_rates(form: torch.dtype, side: int) -> Iterator[tuple[str, float]]:
    device = training_device()
    for n in (side // 4, side // 2, side):
        one, other = (torch.randn(n, n, device=device).to(form) for _ in range(2))
        yield f"a product of {n}²", 2 * n**3 / _least_seconds(torch.mm, one, other)
    images = 64 if device.type == "cuda" else 4
    for pixels, channels in CONVOLUTIONS:
        layer = _convolution(channels, channels).to(device, form)
        maps = torch.randn(images, channels, pixels, pixels, device=device).to(form)
        seconds = _least_seconds(layer, maps.contiguous(memory_format=torch.channels_last))
        yield f"a convolution of {channels} maps of {pixels}²", images * 18 * (channels * pixels) ** 2 / seconds


def _least_seconds(work: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    """Of some rounds; reading a number of the result waits for the device."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        float(work(*inputs).flatten()[0])
        taken.append(time.perf_counter() - started)
    return min(taken)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _engine_rate(pixels: int, channels: int, dtype: str) -> tuple[str, float]:
    """The engine's name, and its operations a second in a network of equal layers: the best that it does with them."""
    layers = [layer for _ in range(6) for layer in (_convolution(channels, channels), nn.ReLU())]
    chain = nn.Sequential(_convolution(3, channels), nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    transform = Transform(pixels, pixels)
    engine = open_engine(chain.eval(), transform, cast(Precision, dtype))
    pictures = np.zeros((4 * engine.batch, pixels, pixels, 3), np.uint8)
    speed = 0.0
    for _ in range(ROUNDS // 2):
        speed = max(speed, per_second(len(pictures), lambda: outputs_of(engine, pictures), rounds=1))
    return engine.name, speed * 2 * products_of(chain, transform)


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
