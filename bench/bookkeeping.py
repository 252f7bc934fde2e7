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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench.train import ROOT, machine
from bench.turns import start
from ml import network
from ml.admission import whole
from ml.engines import open_engine, outputs_of
from ml.transforms import Transform
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
    memory_mb: list[float]

    @property
    def ms(self) -> float:
        """Milliseconds a scan."""
        return self.seconds / self.scans * 1e3

    @property
    def growth(self) -> float:
        """Memory in the last quarter of the time against that in the first."""
        quarter = max(1, len(self.memory_mb) // 4)
        return mean(self.memory_mb[-quarter:]) / mean(self.memory_mb[:quarter])


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
    engine = open_engine(whole(model).eval(), model.transform)
    images = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    outputs_of(engine, images[:8])
    started = time.perf_counter()
    outputs_of(engine, images)
    return (time.perf_counter() - started) / len(images) * 1e3


def _measure(processes: Stack, scans: int, chunk: int) -> Side:
    Console().print(f"{scans:,} scans …")
    job_id = batch(processes, words(scans), chunk)
    with _watched(processes) as memory:
        job = processes.wait_for(job_id, 1800)
    assert (job.state, job.succeeded) == ("succeeded", scans), processes.logs()
    assert job.finished_at is not None
    return Side(scans, (job.finished_at - job.created_at).total_seconds(), memory)


@contextmanager
def _watched(processes: Stack) -> Iterator[list[float]]:
    """Resident megabytes of the predicting worker with its children, ten times a second."""
    taken: list[float] = []
    over = threading.Event()

    def watch() -> None:
        parent = psutil.Process(processes.running["predict"].pid)
        while not over.wait(0.1):
            with suppress(psutil.NoSuchProcess):
                taken.append(sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def _report(sides: list[Side], device: float, chunk: int) -> int:
    rows: list[dict[str, Any]] = [
        {
            "scans": side.scans,
            "seconds": round(side.seconds, 2),
            "ms_per_scan": round(side.ms, 3),
            "share": round(side.ms / (side.ms + device), 4),
            "memory_growth": round(side.growth, 3),
            "memory_mb": round(max(side.memory_mb), 1),
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
