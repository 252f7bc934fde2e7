"""Ours beside the plain loop, PyTorch Lightning and torchvision's reference: `python -m bench.train`.

The plain side (bench/peers/plain.py) is what projects of this kind ship: the whole network forward in fp32 in every
epoch, PIL transforms, a DataLoader, `requires_grad = False` on the features, an evaluation after each epoch. Ours is
`python -m ml train`. All unpack the zip, check it, split it by the same rule, train, evaluate and save, in a process of
their own, so that time (of the whole process) and peak memory are honest. Two settings: 2 epochs with augmentation; 10
without. `--seeds N` repeats ours and the plain loop for the quality. Prints tables, writes bench/out/train.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out" / "train.json"
SHARED = ROOT.parent / "shared" / "data" / "mri-465.zip"
PARAMS = {"weights": "none", "learning_rate": 0.01, "classes": 2, "keep": "last"}


@dataclass(frozen=True)
class Side:
    """One side: seconds of its whole process, its peak memory (loaders not counted), scores on the test scans; of ours
    the seconds of CPU time too."""

    seconds: float
    accuracy: float
    f1: float
    peak_mb: float
    train_seconds: list[float]
    cpu_seconds: float | None = None


SETTINGS = {
    "augmented_2_epochs": {"epochs": 2, "augmentation": True},
    "cached_10_epochs": {"epochs": 10, "augmentation": False},
}
SIDES = {
    "plain": "bench.peers.plain",
    "lightning": "bench.peers.lightning",
    "reference": "bench.peers.reference",
    "ours": "bench.peers.ours",
}
AT_LEAST = {"augmented_2_epochs": 6.0, "cached_10_epochs": 15.0}
"""Times that ours is to be faster than the plain loop, on a CPU that multiplies bf16 in matrix units (AMX)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sides and report."""
    parsed = _parser().parse_args(argv)
    results: dict[str, Any] = {"machine": machine(), "params": PARAMS}
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as folder:
        data = data_of(parsed.data, parsed.quick, Path(folder))
        results["data"] = data.name
        for name in parsed.settings:
            fields = SETTINGS[name] | ({"epochs": 1} if parsed.quick else {})
            results[name] = compare(name, data, fields, parsed.sides, parsed.seeds)
            if "plain" in parsed.sides:
                results[f"ratio_{name}"] = results[name]["ratios"]["plain"]
    # A quick run is no measurement: it must not overwrite one.
    out = OUT.with_stem("train-quick") if parsed.quick else OUT
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console().print(f"written: {out.relative_to(ROOT)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a zip with one folder a class")
    parser.add_argument("--quick", action="store_true", help="one epoch on few synthetic scans: does it run at all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ours always runs")
    parser.add_argument("--seeds", type=int, default=1, help="of ours and the plain loop; the others run with one")
    return parser


def data_of(given: Path | None, quick: bool, folder: Path) -> Path:
    """The zip: as given, from RENALQ_BENCH_DATA, the shared real scans, else synthetic ones in equal number."""
    named = given or (Path(os.environ["RENALQ_BENCH_DATA"]) if os.environ.get("RENALQ_BENCH_DATA") else SHARED)
    if named.exists() and not quick:
        return named
    patients, slices = (12, 4) if quick else (93, 5)
    target = folder / f"phantom-{patients * slices}.zip"
    size = ["--patients", str(patients), "--slices", str(slices)]
    subprocess.run([sys.executable, "-m", "ml", "phantom", "--out", str(target), *size], cwd=ROOT, check=True)
    return target


def compare(name: str, data: Path, fields: dict[str, object], sides: Sequence[str], seeds: int) -> dict[str, Any]:
    """All sides, one after the other. `ratios`: a side's seconds over ours; `f1`: means over the seeds."""
    found: dict[str, list[Side]] = {}
    for side in ("ours", *(one for one in sides if one != "ours")):
        for seed in range(seeds if side in ("ours", "plain") else 1):
            Console().print(f"{name}: {side}, seed {seed} …")
            found.setdefault(side, []).append(run_side(SIDES[side], data, {**PARAMS, **fields, "seed": seed}))
    ours = median(one.seconds for one in found["ours"])
    ratios = {side: round(median(one.seconds for one in runs) / ours, 2) for side, runs in found.items()}
    _show(name, found, ratios)
    return {
        "ratios": ratios,
        "f1": {side: round(fmean(one.f1 for one in runs), 4) for side, runs in found.items()},
        "sides": {side: [asdict(one) for one in runs] for side, runs in found.items()},
    }


def run_side(module: str, data: Path, params: dict[str, object]) -> Side:
    """`python -m MODULE DATA PARAMS` in an empty folder; its last line of output is a JSON object of scores."""
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as folder:
        params_path = Path(folder) / "params.yaml"
        params_path.write_text(yaml.safe_dump(params), encoding="utf-8")
        command = [sys.executable, "-m", module, str(data.resolve()), str(params_path), folder]
        started = time.perf_counter()
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds = time.perf_counter() - started
    return Side(round(seconds, 2), **json.loads(output.splitlines()[-1]))


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    from ml.image.engines.hardware import device_name

    return {"device": device_name(), "cores": os.cpu_count(), "python": platform.python_version()}


def _show(name: str, found: dict[str, list[Side]], ratios: dict[str, float]) -> None:
    table = Table("side", "seconds", "accuracy", "F1", "peak MB", "times ours", title=name)
    for side, runs in found.items():
        figures = [median(one.seconds for one in runs), fmean(one.accuracy for one in runs)]
        figures += [fmean(one.f1 for one in runs), max(one.peak_mb for one in runs)]
        seconds, accuracy, f1, peak = figures
        table.add_row(side, f"{seconds:.1f}", f"{accuracy:.3f}", f"{f1:.3f}", f"{peak:.0f}", f"{ratios[side]:.1f}")
    Console().print(table)
    Console().print(f"CPU seconds of ours: {', '.join(str(one.cpu_seconds) for one in found['ours'])}")
    if "plain" in ratios:
        Console().print(f"times faster than the plain loop: {ratios['plain']} (aim with AMX: {AT_LEAST[name]:.0f})")


if __name__ == "__main__":
    raise SystemExit(main())
