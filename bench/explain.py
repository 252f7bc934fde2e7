"""What an explanation costs a single scan: `python -m bench.explain`. By REST alone, on a real `renalq up`.

`POST /jobs/predict` with `Prefer: wait`, from request to answer: plain, explained, and explained for all classes, in
turns, since a machine's speed drifts. A VGG16 at 224 pixels that has learned from a few phantoms for one epoch; each
scan is sent once, 512 × 512. Medians; prints a table, writes bench/out/explain.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import requests
from rich.console import Console
from rich.table import Table

from bench.train import ROOT, machine
from cli.stack.server_plan import free_port
from ml.synthetic import phantom_files

OUT = ROOT / "bench" / "out" / "explain.json"
BOUND = 4.0
"""Most times that an explained scan may take what a plain one takes."""
WAYS = {"plain": "false", "explained": "true", "all classes": "all"}
PARAMS = {"weights": "none", "epochs": 1, "learning_rate": 0.01, "augmentation": False}
WARM = 3


@dataclass(frozen=True)
class Client:
    """Speaks to a running stack."""

    url: str
    key: str

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON; an assertion where it is an error."""
        headers = {"Authorization": f"Bearer {self.key}", "Prefer": "wait=30"}
        answer = requests.request(method, self.url + path, headers=headers, timeout=90, **options)
        assert answer.ok, answer.text
        return answer.json()

    def ended(self, job: Any) -> Any:
        """The job at its end."""
        while not job["terminal"]:
            time.sleep(0.3)
            job = self.ask("GET", job["links"]["self"])
        assert job["state"] == "succeeded", job["error"]
        return job


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.explain")
    parser.add_argument("--scans", type=int, default=30, help="of each way")
    rounds = parser.parse_args(argv).scans
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, _stack(Path(name)) as client:
        folder = Path(name) / "scans"
        phantom_files.write_dataset(folder, patients=12, slices=3, seed=1)
        _train(client, Path(name) / "phantoms.zip")
        seconds = _measure(client, sorted(folder.rglob("*.png")), rounds)
    return _report(seconds)


@contextmanager
def _stack(home: Path) -> Iterator[Client]:
    port = free_port()
    environ = {**os.environ, "RENALQ_HOME": str(home), "RENALQ_PORT": str(port)}
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "cli", "up"], cwd=ROOT, env=environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            assert process.poll() is None, (home / "up.log").read_text()
            time.sleep(0.2)
        yield Client(url, (home / "admin.key").read_text().strip())
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/health/ready", timeout=3).ok
    except requests.RequestException:
        return False


def _train(client: Client, path: Path) -> None:
    phantom_files.write_zip(path, patients=12, slices=3, seed=2)
    with path.open("rb") as file:
        dataset = client.ask("POST", "/datasets", files={"file": (path.name, file)})
    client.ended(client.ask("GET", f"/jobs/{dataset['job_id']}"))
    client.ended(client.ask("POST", "/jobs/train", json={"dataset_id": dataset["id"], "params": PARAMS}))


def _measure(client: Client, pictures: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of each request, by the way it was asked for."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-WARM, rounds):
        for place, way in enumerate(WAYS):
            # Behind its end a PNG may hold more: so no two scans are equal, and nothing is answered from memory.
            content = pictures[number % len(pictures)].read_bytes() + f"{number} {way}".encode()
            started = time.perf_counter()
            job = client.ask(
                "POST", "/jobs/predict", files={"file": (f"{place}.png", content)},
                data={"model": "1", "explain": WAYS[way]},
            )  # fmt: skip
            if number >= 0:
                found[way].append(time.perf_counter() - started)
            _check(client, job, WAYS[way])
    return found


def _check(client: Client, job: Any, explain: str) -> None:
    assert job["state"] == "succeeded", job["error"]
    (result,) = client.ask("GET", job["links"]["results"])["data"]
    assert ("explanation" in result, len(result.get("explanations", {}))) == {
        "false": (False, 0), "true": (True, 0), "all": (True, 2)
    }[explain]  # fmt: skip


def _report(seconds: dict[str, list[float]]) -> int:
    middle = {way: median(each) for way, each in seconds.items()}
    ratios = {way: round(value / middle["plain"], 2) for way, value in middle.items()}
    results = {
        "machine": machine(),
        "scans": len(seconds["plain"]),
        "median_ms": {way: round(1000 * value, 1) for way, value in middle.items()},
        "worst_ms": {way: round(1000 * max(each), 1) for way, each in seconds.items()},
        "times_plain": ratios,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("", "median ms", "worst ms", "times", title="A single scan by REST, VGG16 at 224 px")
    for way, each in seconds.items():
        table.add_row(way, f"{1000 * middle[way]:.0f}", f"{1000 * max(each):.0f}", f"{ratios[way]:.2f}")
    Console().print(table, f"written: {OUT.relative_to(ROOT)}")
    return 0 if ratios["explained"] <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
