"""What ImageNet's weights are worth where few scans are labelled: `make bench-fewshot`.

A head learns 5, 10, 20, 40 and 100 scans a class on frozen VGG16 features, of ImageNet's weights and of random ones:
the same scans, steps and learning rate, and the same held-out test scans (patients, copies and near-duplicates stay on
one side). Repeated with other scans and another head. Without --data on phantoms with masses of 6 to 20 mm. A
difference is claimed only where the sign test over all draws reaches 5 %, which takes 6 draws. Prints a table, and
writes bench/out/fewshot.json and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.fewshot.curve import Point, features_of, middle_and_spread, params_of, points
from bench.fewshot.data import Scans, unpack, write_phantoms
from bench.train import ROOT, machine
from ml.command.options import weights_folder
from ml.image.networks.weights_fetch import fetch_imagenet_weights
from ml.image.pixels.transforms import Transform
from ml.runtime.errors import WeightsMissing

OUT = ROOT / "bench" / "out" / "fewshot.json"
SIZES = [5, 10, 20, 40, 100]
NAMES = {"imagenet": "ImageNet", "none": "random"}


def main(argv: Sequence[str] | None = None) -> int:
    """Compute features, train, report."""
    parsed, console = _parser().parse_args(argv), Console()
    try:
        weights = fetch_imagenet_weights("vgg16", weights_folder(), lambda text, done: None)
    except WeightsMissing as error:
        console.print(str(error), highlight=False)
        return 1
    transform = Transform(parsed.side, parsed.side)
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name:
        folder = Path(name)
        source = unpack(parsed.data, folder) if parsed.data else write_phantoms(folder / "phantoms", parsed.patients)
        scans = Scans.read(source, transform)
    results = {**_setting(parsed, scans), "machine": machine(), "weights": weights.name, "points": []}
    console.print(f"{results['scans']} scans, {len(scans.test)} of them held out", highlight=False)
    began, seen = time.monotonic(), []
    features = {
        source: features_of(scans, transform, params_of(parsed.head, source, 1, 0), file)
        for source, file in (("imagenet", weights), ("none", None))
    }
    console.print(f"features in {time.monotonic() - began:.0f} s", highlight=False)
    if results["head"] == "gap":
        torch.set_num_threads(1)  # products this small are slower on several
    for point in points(scans, transform, features, parsed.sizes, parsed.draws, parsed.head):
        seen.append(point)
        console.print(f"{point.per_class} a class after {time.monotonic() - began:.0f} s", highlight=False)
        results["points"].append({**vars(point), "verdict": point.verdict})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _show(seen, console)
    _plot(seen, results, OUT.with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fewshot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="a zip with one folder a class; default: phantoms with small masses")
    parser.add_argument("--patients", type=int, default=400, help="of the phantoms; one slice each")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="scans a class to learn from")
    parser.add_argument("--draws", type=int, default=7, help="trainings a point, each with other scans")
    parser.add_argument("--head", choices=["auto", "vgg", "gap"], default="auto", help="see the parameter head")
    parser.add_argument("--side", type=int, default=224, help="pixels of the network's input")
    return parser


def _setting(parsed: argparse.Namespace, scans: Scans) -> dict[str, Any]:
    data = parsed.data.name if parsed.data else f"{parsed.patients} phantoms, masses of 6 to 20 mm"
    params = params_of(parsed.head, "imagenet", 1, 0)
    return {
        "data": data, "scans": scans.report.images, "classes": scans.report.classes, "test": len(scans.test),
        "draws": parsed.draws, "head": params.head_kind, "side": parsed.side, "learning_rate": params.learning_rate,
    }  # fmt: skip


def _show(seen: list[Point], console: Console) -> None:
    table = Table("a class", *(f"{name}: accuracy" for name in NAMES.values()), "gain", "verdict")
    for point in seen:
        accuracy = (middle_and_spread(point.accuracy[source]) for source in NAMES)
        table.add_row(str(point.per_class), *accuracy, f"{median(point.gains):+.3f}", point.verdict)
    console.print(table)


def _plot(seen: list[Point], results: dict[str, Any], path: Path) -> None:
    """Medians as lines, and the range over all draws as bands."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    sizes = [point.per_class for point in seen]
    for source, name in NAMES.items():
        values = [point.accuracy[source] for point in seen]
        axes.fill_between(sizes, [min(one) for one in values], [max(one) for one in values], alpha=0.2)
        axes.plot(sizes, [median(one) for one in values], marker="o", label=f"{name} weights")
    axes.axhline(1 / len(results["classes"]), color="grey", linestyle=":", label="chance, equal classes")
    axes.set(xscale="log", xlabel="labelled scans a class", ylabel="accuracy on held-out scans", title=results["data"])
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
