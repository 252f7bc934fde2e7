"""What an upload costs the API in memory: `python -m bench.uploads`. 2 GB in one request, and 2 GB in pieces.

A real API under gunicorn, on a Postgres of its own: 2,700 pictures in one multipart call, then a zip of them by the
resumable way (tus), each submitted as a batch. Prints resident memory before and at the peak, and the speed. Writes
bench/out/uploads.json.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.predict import watched
from bench.queues.stack import start
from bench.train import ROOT, machine
from cli.client import Client, MultipartUpload, ProgressListener
from cli.client.uploads import upload_file
from cli.stack.server_plan import LOOPBACK, free_port
from jobs import keys
from tests.builders import TENANT
from tests.faults.sabotage import Sabotage
from tests.faults.work import champion
from tests.processes import Stack, eventually

OUT = ROOT / "bench" / "out" / "uploads.json"
PICTURE_MB = 0.79
FLAT_MB = 64.0
"""Growth that still is flat: buffers of a few threads, whatever the upload's size."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.uploads")
    parser.add_argument("--gb", type=float, default=2.0)
    parsed = parser.parse_args(argv)
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        plan = Sabotage(folder)
        plan.network()
        processes = start(folder, everything, plan.environ())
        api, client = everything.enter_context(_serving(processes))
        champion(processes)
        pictures = _pictures(folder / "pictures", int(parsed.gb * 1024 / PICTURE_MB))
        packed = _packed(folder / "night.zip", pictures)
        _multipart(client, pictures[:20])
        rows = [
            _measured("one request", api, pictures, lambda: _multipart(client, pictures)),
            _measured("in pieces", api, [packed], lambda: _in_pieces(client, packed)),
        ]
    return _report(rows)


@contextmanager
def _serving(processes: Stack) -> Iterator[tuple[psutil.Process, Client]]:
    """The API, and a client of it."""
    port = free_port()
    with processes.sessions.begin() as session:
        secret = keys.create(session, "bench", [keys.Scope.ADMIN], TENANT).secret
    command = ["-m", "gunicorn", "-c", "api/gunicorn_conf.py", "--bind", f"{LOOPBACK}:{port}", "api:create_app()"]
    with (processes.settings.home / "api.log").open("ab") as log:
        server = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=processes.environ(), stdout=log, stderr=log)
    client = Client(f"http://{LOOPBACK}:{port}", secret)

    def answers() -> bool:
        with suppress(Exception):
            client.call("GET", "/jobs")
            return True
        return False

    try:
        eventually(answers, 30, processes.logs)
        yield psutil.Process(server.pid), client
    finally:
        server.terminate()
        server.wait(30)


def _pictures(folder: Path, count: int) -> list[Path]:
    """Noise of 512 × 512 that does not pack; each file differs behind its end, where a PNG may hold more."""
    folder.mkdir()
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, "PNG", compress_level=0)
    paths = [folder / f"{number:05}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(sink.getvalue() + str(number).encode())
    return paths


def _packed(path: Path, pictures: Sequence[Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, picture in enumerate(pictures):
            archive.write(picture, f"{number % 10}/{picture.name}")
    return path


def _multipart(client: Client, pictures: Sequence[Path]) -> str:
    return str(client.post_files("/jobs/predict/batch", MultipartUpload("files", pictures))["id"])


def _in_pieces(client: Client, packed: Path) -> str:
    upload_id = upload_file(client, packed, ProgressListener())
    return str(client.call("POST", "/jobs/predict/batch", json={"upload_id": upload_id})["id"])


def _measured(name: str, api: psutil.Process, files: Sequence[Path], send: Callable[[], str]) -> dict[str, Any]:
    Console().print(f"{name} …")
    size = sum(path.stat().st_size for path in files) / 2**20
    started = time.monotonic()
    with watched(api.pid, every=0.02) as use:
        send()
    seconds, before, peak = time.monotonic() - started, use.memory_mb[0], max(use.memory_mb)
    return {
        "way": name,
        "mb": round(size),
        "mb_per_second": round(size / seconds, 1),
        "memory_before_mb": before,
        "memory_peak_mb": peak,
        "growth_mb": round(peak - before, 1),
    }


def _report(rows: list[dict[str, Any]]) -> int:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine(), "uploads": rows}, indent=1) + "\n", encoding="utf-8")
    table = Table(*(name.replace("_", " ") for name in rows[0]), title="The API's memory during an upload")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    return 0 if all(row["growth_mb"] <= FLAT_MB for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
