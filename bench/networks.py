"""All six networks, trained and used by REST alone on one stack: `python -m bench.networks`.

Each learns the same scans with `weights: none` and then predicts a few of them. Prints the F1 of the test scans with
its interval, the seconds of the job, and what was predicted; writes bench/out/networks.json. Ends with 1 where a
network does not train or not predict.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.train import ROOT, data_of, machine
from cli.client import Client, Job, Json
from cli.commands.demo import ready_client, running_stack
from ml.spec.image import NETWORKS

OUT = ROOT / "bench" / "out" / "networks.json"
COMMON: Json = {"weights": "none", "augmentation": False, "learning_rate": 0.01}
EPOCHS = {"vgg16": 8}
"""A large head learns fast; one layer on random features needs more passes, which cost nothing."""
SCANS = 4  # of each class, to predict


def main(argv: Sequence[str] | None = None) -> int:
    """Train, predict and report."""
    parsed = _parser().parse_args(argv)
    results: dict[str, Any] = {"machine": machine(), "networks": {}}
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name:
        folder = Path(name)
        os.environ.pop("RENALQ_PORT", None)
        archive = data_of(parsed.data, False, folder)
        with running_stack(folder / "home") as stack:
            client = ready_client(stack, folder / "home")
            dataset, scans = client.ready_dataset(archive, "bench")["id"], _some_scans(archive, folder)
            for network in parsed.networks:
                found = _try(client, dataset, network, scans)
                results["networks"][network] = found
                Console().print(network, found)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _show(results["networks"])
    return 0 if all("f1" in one and one["predicted"] == len(scans) for one in results["networks"].values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a zip with one folder a class")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    return parser


def _some_scans(archive: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.lower().endswith((".jpg", ".png", ".dcm")))
        return [Path(file.extract(name, folder / "scans")) for name in [*names[:SCANS], *names[-SCANS:]]]


def _try(client: Client, dataset: str, network: str, scans: list[Path]) -> dict[str, Any]:
    params = {**COMMON, "network": network, "epochs": EPOCHS.get(network, 30)}
    job = client.wait(client.train({"dataset_id": dataset}, params, name=network).id)
    if job.state != "succeeded":
        return {"failure": job.failure}
    metrics = job.raw["metrics"]
    batch = client.wait(client.predict_batch(scans, job.raw["model_version"]).id)
    labels = [one.label for one in client.results(batch.id)]
    truth = ["Normal"] * SCANS + ["Tumor"] * SCANS
    return {
        "f1": metrics["f1"],
        "interval": metrics["intervals"]["f1"],
        "roc_auc": metrics["roc_auc"],
        "seconds": _seconds(job),
        "predicted": sum(label is not None for label in labels),
        "as_labelled": sum(label == true for label, true in zip(labels, truth, strict=True)),
    }


def _seconds(job: Job) -> float:
    began, ended = (datetime.fromisoformat(job.raw[name]) for name in ("created_at", "finished_at"))
    return round((ended - began).total_seconds(), 1)


def _show(networks: dict[str, dict[str, Any]]) -> None:
    table = Table("network", "F1", "95 % interval", "ROC-AUC", "seconds", "predicted", "as labelled")
    for name, one in networks.items():
        if "failure" in one:
            table.add_row(name, str(one["failure"]))
            continue
        low, high = one["interval"]
        figures = f"{one['f1']:.3f}", f"{low:.3f} to {high:.3f}", f"{one['roc_auc']:.3f}", f"{one['seconds']:.0f}"
        table.add_row(name, *figures, str(one["predicted"]), str(one["as_labelled"]))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
