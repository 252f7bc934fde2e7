"""Batch predictions beside other ways to serve a network: `python -m bench.predict`. VGG16 on 512 × 512 JPEGs.

a  the network is loaded for each scan (document 000)      d  LitServe with dynamic batching, 32 clients
b  warm, one scan after the other, torch fp32              e  the ceiling: the engine alone, pictures in memory
c  Celery, one task a scan, warm                           f  ours: files in storage → rows in Postgres
                                                           g  ours with two workers on the one device

c to g predict with the same engine: the fastest that the model is admitted for. Images a second, ratios, peak
memory and CPU use of each side's processes, in one run; the slow sides see fewer scans. `--int8` adds e and f with an
int8 engine. Prints a table, writes bench/out/predict.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.queues.stack import start
from bench.train import ROOT, machine
from bench.turns import keep, register
from cli.stack.embedded import embedded_redis
from cli.stack.server_plan import free_port
from jobs.queue import pace
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from ml.image.engines.admission import RANGE_SCANS, whole_network
from ml.image.engines.backends import engine_name
from ml.image.engines.graphs import activation_ranges, graph_of
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.pixels.transforms import Transform
from ml.synthetic.phantom import generate
from ml.synthetic.phantom_files import windowed
from tests.processes import Stack, eventually

OUT = ROOT / "bench" / "out" / "predict.json"
TENANT = "bench"
SLOW = {"a": 12, "b": 60, "c": 400, "d": 400, "e": 400}
"""Scans of the sides whose speed does not change with their number."""
CLIENTS = 32
LOOK_SECONDS = 1.0


@dataclass
class Side:
    """What a side did, and what it cost. `cpu`: cores busy on average. `growth`: memory in the last quarter of the
    time against that in the first."""

    scans: int
    seconds: float
    peak_mb: float
    cpu: float
    growth: float

    @property
    def per_second(self) -> float:
        """Images."""
        return self.scans / self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name:
        folder = Path(name)
        scans = make_scans(folder / "scans", parsed.scans)
        rounds = [("", "bf16" if "bf16" in supported_dtypes() else "fp32")]
        rounds += [("_int8", "int8")] if parsed.int8 and "int8" in supported_dtypes() else []
        sides: dict[str, Side] = {}
        for suffix, form in rounds:
            os.environ["BENCH_MODEL"] = str(make_model(folder / f"{form}.safetensors", form, scans))
            wanted = parsed.sides if not suffix else [side for side in ("e", "f") if side in parsed.sides]
            for side in wanted:
                Console().print(f"{side}{suffix} …")
                sides[side + suffix] = _measure(side, folder, scans)
    return report(sides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=2000)
    parser.add_argument("--sides", nargs="+", choices=list("abcdefg"), default=list("abcdefg"))
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True)
    return parser


# --- what there is to predict ---


def make_scans(folder: Path, count: int) -> list[Path]:
    """So many different JPEGs of 512 × 512: synthetic slices, each turned and mirrored in eight ways."""
    folder.mkdir(parents=True)
    slices = [windowed(one.hu) for one in generate(patients=-(-count // 8), slices=1, seed=5)]
    paths = []
    for number in range(count):
        picture = np.rot90(slices[number // 8], number % 4)
        picture = picture[:, ::-1] if number % 8 >= 4 else picture
        sink = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).convert("RGB").save(sink, "JPEG", quality=90)
        paths.append(folder / f"{number:06}.jpg")
        paths[-1].write_bytes(sink.getvalue())
    return paths


def make_model(path: Path, form: str, scans: list[Path]) -> Path:
    """An untrained VGG16 costs what a trained one does. It is admitted for one form, whatever it says in it."""
    model = network.Model(network.build(2, seed=0), ("Normal", "Tumor"), Transform())
    trials = {engine_name(form): {"admitted": True, "reason": "for the benchmark"}}  # type: ignore[arg-type]
    metadata: dict[str, Any] = {"engines": trials, "ranges": None}
    if form == "int8":
        seen = np.stack([model.transform.resize(np.asarray(Image.open(path))) for path in scans[:RANGE_SCANS]])
        metadata["ranges"] = activation_ranges(graph_of(whole_network(model).eval(), model.transform), seen)
    network.save(network.Model(model.network, model.classes, model.transform, metadata), path)
    return path


# --- the sides ---


def _measure(side: str, folder: Path, scans: list[Path]) -> Side:
    some = scans[: min(SLOW.get(side, len(scans)), len(scans))]
    if side in "abe":
        return _alone({"a": "cold", "b": "warm", "e": "ceiling"}[side], folder / "scans", len(some))
    if side == "c":
        return _celery(folder, some)
    return _litserve(folder, some) if side == "d" else _ours(scans, workers=2 if side == "g" else 1)


def _alone(way: str, folder: Path, count: int) -> Side:
    arguments = [sys.executable, "-m", "bench.peers.serving.alone", way, str(folder), str(count)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with watched(process.pid) as use:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{way} ended with {process.returncode}")
    said = json.loads(output.splitlines()[-1])
    return use.side(said["scans"], said["seconds"])


def _celery(folder: Path, scans: list[Path]) -> Side:
    with embedded_redis(folder / "redis-c") as url:
        os.environ["RENALQ_REDIS_URL"] = url
        from bench.peers.serving.celery_tasks import predict

        arguments = ["-m", "celery", "-A", "bench.peers.serving.celery_tasks", "worker", "-c", "1", "-l", "WARNING"]
        with process([*arguments, "--without-gossip", "--without-mingle"], folder / "celery.log") as pid:
            for answer in [predict.delay(str(path)) for path in scans[:8]]:
                answer.get(timeout=120)
            with watched(pid) as use:
                started = time.perf_counter()
                answers = [predict.delay(str(path)) for path in scans]
                for answer in answers:
                    answer.get(timeout=600)
                seconds = time.perf_counter() - started
    return use.side(len(scans), seconds)


def _litserve(folder: Path, scans: list[Path]) -> Side:
    port, local = free_port(), threading.local()

    def ask(path: Path) -> None:
        local.session = getattr(local, "session", None) or requests.Session()
        image = base64.b64encode(path.read_bytes()).decode()
        answer = local.session.post(f"http://127.0.0.1:{port}/predict", json={"image": image}, timeout=120)
        answer.raise_for_status()

    with process(["-m", "bench.peers.serving.litserve_app", str(port)], folder / "litserve.log") as pid:
        eventually(lambda: _answers(port), 120, lambda: (folder / "litserve.log").read_text()[-2000:])
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(ask, scans[:CLIENTS]))
            with watched(pid) as use:
                started = time.perf_counter()
                list(pool.map(ask, scans))
                seconds = time.perf_counter() - started
    return use.side(len(scans), seconds)


def _answers(port: int) -> bool:
    with suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    return False


def _ours(scans: list[Path], workers: int) -> Side:
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, ExitStack() as everything:
        processes = start(Path(name), everything)
        names = ["predict", *(f"predict-{number}" for number in range(1, workers))]
        for alias in names[1:]:
            processes.start("predict", alias)
        processes.alive(workers)
        version = register(processes, TENANT, Path(os.environ["BENCH_MODEL"]))
        ids = keep(processes, TENANT, scans, "image/jpeg")
        _predicted(processes, version, ids[:64], chunk=16)  # the network is loaded, by each; the lane's pace is known
        with watched(*(processes.running[name].pid for name in names)) as use:
            seconds = _predicted(processes, version, ids)
    return use.side(len(scans), seconds)


def _predicted(processes: Stack, version: tuple[uuid.UUID, int], ids: list[uuid.UUID], chunk: int = 0) -> float:
    """Seconds from the submit to the job's end, by Postgres' clock."""
    with processes.sessions.begin() as session:
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=version[0], model_version=version[1])
        size = chunk or pace.chunk_size(session, Lane.BATCH, processes.settings)
        job = submit(session, new, [NewResult(scan_id) for scan_id in ids], size)
    while processes.job(job.id).finished_at is None:  # who looks more often takes some of the cores away
        time.sleep(LOOK_SECONDS)
    ended = processes.job(job.id)
    assert ended.state == "succeeded", ended.error
    assert ended.finished_at is not None
    return (ended.finished_at - ended.created_at).total_seconds()


# --- processes ---


@dataclass
class Use:
    """Summed resident memory at each look, and cores that were busy on average."""

    memory_mb: list[float] = field(default_factory=list)
    cpu: float = 0.0

    @property
    def growth(self) -> float:
        """Memory in the last quarter of the time against that in the first."""
        quarter = max(1, len(self.memory_mb) // 4)
        return mean(self.memory_mb[-quarter:]) / mean(self.memory_mb[:quarter])

    def side(self, scans: int, seconds: float) -> Side:
        """What was done meanwhile, with what it cost."""
        return Side(scans, seconds, max(self.memory_mb), self.cpu, round(self.growth, 3))


@contextmanager
def watched(*pids: int, every: float = LOOK_SECONDS) -> Iterator[Use]:
    """What processes and their children use during the block, looked at `every` so many seconds."""
    use, over, started = Use(), threading.Event(), time.perf_counter()
    first: dict[int, float] = {}
    last: dict[int, float] = {}

    def look() -> None:
        with suppress(psutil.NoSuchProcess):
            memory, parents = 0, [psutil.Process(pid) for pid in pids]
            for one in [*parents, *(child for parent in parents for child in parent.children(recursive=True))]:
                with suppress(psutil.NoSuchProcess):
                    times, memory = one.cpu_times(), memory + one.memory_info().rss
                    last[one.pid] = times.user + times.system
                    first.setdefault(one.pid, last[one.pid])
            use.memory_mb.append(round(memory / 2**20, 1))

    def watch() -> None:
        while not over.wait(every):
            look()

    look()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield use
    finally:
        over.set()
        thread.join()
        use.cpu = round(sum(last[one] - first[one] for one in last) / (time.perf_counter() - started), 2)


@contextmanager
def process(arguments: Sequence[str], log: Path) -> Iterator[int]:
    """A process of our Python, for the length of the block; its number."""
    with log.open("wb") as file:
        started = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=file)
    try:
        yield started.pid
    finally:
        children = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.terminate()
        started.wait(30)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


# --- the report ---


def report(sides: dict[str, Side]) -> int:
    """Print the table and write the figures."""
    ratios = {
        f"{ours}/{theirs}": round(sides[ours].per_second / sides[theirs].per_second, 2)
        for ours, theirs in [
            *(("f", one) for one in "abcde"),
            *(("f_int8", one) for one in ("b", "e_int8")),
            ("g", "f"),
        ]
        if ours in sides and theirs in sides
    }
    figures = {name: round(side.per_second, 2) for name, side in sides.items()}
    results = {
        "machine": machine(),
        **figures,
        "ratios": ratios,
        "sides": {name: asdict(side) for name, side in sides.items()},
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("side", "scans", "images/s", "peak MB", "growth", "cores", title="VGG16, 512 × 512 JPEG")
    for name, side in sides.items():
        table.add_row(
            name,
            str(side.scans),
            f"{side.per_second:.2f}",
            f"{side.peak_mb:.0f}",
            f"{side.growth:.3f}",
            f"{side.cpu:.2f}",
        )
    Console().print(table)
    Console().print(ratios)
    Console().print(f"written: {OUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
