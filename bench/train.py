"""The plain training loop against ours, on the same scans: `python -m bench.train [--data ZIP] [--quick] [--cached]`.

The plain side (bench/plain.py) is what projects of this kind ship: the whole network forward in fp32 in every epoch,
PIL transforms, a DataLoader, `requires_grad = False` on the features, an evaluation after each epoch. Ours is
`python -m ml run`. Both unpack the zip, check it, split it by the same rule, train, evaluate and save, in a process of
their own, so that time (of the whole process) and peak memory are honest. Prints a table, writes bench/out/train.json.
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

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out" / "train.json"
SHARED = ROOT.parent / "shared" / "data" / "mri-465.zip"
PARAMS = {"weights": "none", "learning_rate": 0.01, "classes": 2, "seed": 0}


@dataclass(frozen=True)
class Side:
    """One side: seconds of its whole process, its peak memory (loaders not counted), scores on the held-out scans."""

    seconds: float
    accuracy: float
    f1: float
    peak_mb: float
    train_seconds: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides and report."""
    parsed = _parser().parse_args(argv)
    results: dict[str, object] = {"machine": machine(), "params": PARAMS}
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as folder:
        data = _data(parsed.data, parsed.quick, Path(folder))
        results["data"] = data.name
        compare(results, "augmented_2_epochs", data, epochs=1 if parsed.quick else 2, augmentation=True)
        if parsed.cached:
            compare(results, "cached_10_epochs", data, epochs=10, augmentation=False)
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
    parser.add_argument(
        "--cached", action="store_true", help="also 10 epochs without augmentation (a quarter of an hour)"
    )
    return parser


def _data(given: Path | None, quick: bool, folder: Path) -> Path:
    """The zip: as given, from RENALQ_BENCH_DATA, the shared real scans, else synthetic ones in equal number."""
    named = given or (Path(os.environ["RENALQ_BENCH_DATA"]) if os.environ.get("RENALQ_BENCH_DATA") else SHARED)
    if named.exists() and not quick:
        return named
    patients, slices = (12, 4) if quick else (93, 5)
    target = folder / f"phantom-{patients * slices}.zip"
    size = ["--patients", str(patients), "--slices", str(slices)]
    subprocess.run([sys.executable, "-m", "ml", "phantom", "--out", str(target), *size], cwd=ROOT, check=True)
    return target


def compare(results: dict[str, object], name: str, data: Path, epochs: int, augmentation: bool) -> None:
    """Both sides, one after the other; the ratio of their seconds goes to `ratio_NAME`."""
    params = {**PARAMS, "epochs": epochs, "augmentation": augmentation}
    Console().print(f"{name}: the plain loop first; it takes minutes on a CPU …")
    plain = run_side("bench.plain", data, params)
    ours = run_side("bench.ours", data, params)
    ratio = plain.seconds / ours.seconds
    results[f"ratio_{name}"] = round(ratio, 2)
    results[name] = {"plain": asdict(plain), "ours": asdict(ours)}
    _show(name, plain, ours, ratio)


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
    from ml.engines import device_name

    return {"device": device_name(), "cores": os.cpu_count(), "python": platform.python_version()}


def _show(name: str, plain: Side, ours: Side, ratio: float) -> None:
    table = Table("", "plain", "ours", title=name)
    for label, field, form in (
        ("seconds", "seconds", "{:.1f}"),
        ("accuracy, held out", "accuracy", "{:.3f}"),
        ("F1, held out", "f1", "{:.3f}"),
        ("peak memory, MB", "peak_mb", "{:.0f}"),
    ):
        table.add_row(label, form.format(getattr(plain, field)), form.format(getattr(ours, field)))
    table.add_row("[bold]times faster", "", f"[bold]{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
