"""What a batch costs beside its device: `python -m bench.bookkeeping`. 1,000, 10,000 and 100,000 scans, in one run.

A real dispatcher and a real worker, whose network answers at once: what is left is submitting, claiming, reading files
and writing rows. Its time per scan must not grow with the batch, and must be small beside what a scan costs the device,
which is measured here too (VGG16, pictures in memory, the fastest engine). The worker's memory is watched meanwhile.
Prints a table, writes bench/out/bookkeeping.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.predict import Use, watched
from bench.queues.stack import start
from bench.train import ROOT, machine
from ml.image.engines.admission import whole_network
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import outputs_of
from ml.image.networks import network
from ml.image.pixels.transforms import Transform
from tests.faults.sabotage import Sabotage
from tests.faults.work import batch, words
from tests.processes import Stack

OUT = ROOT / "bench" / "out" / "bookkeeping.json"
SIZES = (1_000, 10_000, 100_000)
SHARE = 0.03
"""Most of a scan's time that may go to bookkeeping."""


@dataclass
class Side:
    """A batch of so many scans: seconds from its first row to its end; the worker's memory meanwhile."""

    scans: int
    seconds: float
    use: Use

    @property
    def ms(self) -> float:
        """Milliseconds a scan."""
        return self.seconds / self.scans * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.bookkeeping")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--chunk", type=int, default=128, help="scans in a unit: the default where no pace is known")
    parsed = parser.parse_args(argv)
    device = device_ms()
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        plan = Sabotage(folder)
        plan.network()
        processes = start(folder, everything, plan.environ())
        _measure(processes, 200, parsed.chunk)  # all is imported and warm
        sides = [_measure(processes, size, parsed.chunk) for size in parsed.sizes]
    return _report(sides, device, parsed.chunk)


def device_ms() -> float:
    """What a scan costs the fastest engine here, from a picture in memory to its logits."""
    model = network.Model(network.build(2, seed=0), ("Normal", "Tumor"), Transform())
    engine = open_engine(whole_network(model).eval(), model.transform)
    images = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    outputs_of(engine, images[:8])
    started = time.perf_counter()
    outputs_of(engine, images)
    return (time.perf_counter() - started) / len(images) * 1e3


def _measure(processes: Stack, scans: int, chunk: int) -> Side:
    Console().print(f"{scans:,} scans …")
    job_id = batch(processes, words(scans), chunk)
    with watched(processes.running["predict"].pid, every=0.1) as use:
        job = processes.wait_for(job_id, 1800)
    assert (job.state, job.succeeded) == ("succeeded", scans), processes.logs()
    assert job.finished_at is not None
    return Side(scans, (job.finished_at - job.created_at).total_seconds(), use)


def _report(sides: list[Side], device: float, chunk: int) -> int:
    rows: list[dict[str, Any]] = [
        {
            "scans": side.scans,
            "seconds": round(side.seconds, 2),
            "ms_per_scan": round(side.ms, 3),
            "share": round(side.ms / (side.ms + device), 4),
            "memory_growth": round(side.use.growth, 3),
            "memory_mb": round(max(side.use.memory_mb), 1),
        }
        for side in sides
    ]
    results = {"machine": machine(), "chunk": chunk, "device_ms_per_scan": round(device, 2), "batches": rows}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table(*(name.replace("_", " ") for name in rows[0]), title="Bookkeeping alone: the network answers at once")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    console = Console()
    console.print(table)
    console.print(f"the device takes {device:.1f} ms a scan; written: {OUT.relative_to(ROOT)}")
    return 0 if all(row["share"] <= SHARE for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
