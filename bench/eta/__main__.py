"""What clients are told of a job's end, against the truth: `python -m bench.eta [--network vgg16] [--scans N]`.

A real dispatcher and real workers that have just started, on a Postgres and a Redis of their own. Two trainings, the
second beside a champion, then the first batch that the stack ever predicts, and the same batch again. Each job is asked
as a client asks, twice a second. Scored: the absolute percentage error of the ETA at 25, 50 and 75 % of the way, the
ETA after a batch's first chunk over the truth, and the longest time that progress stood still, as a share of the job.
Prints a table, writes bench/out/eta.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from bench.queues.stack import start
from bench.train import ROOT, data_of, machine
from jobs.queue import pace
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import queries
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Dataset, ModelVersion, Scan
from ml.synthetic import phantom_files
from tests.processes import Stack

OUT = ROOT / "bench" / "out" / "eta.json"
TENANT, ASK_SECONDS, POINTS = "bench", 0.5, (0.25, 0.50, 0.75)
MOST_FACTOR = 2.0
"""The ETA after the first chunk of the first batch may be wrong by so much."""


@dataclass(frozen=True)
class Sample:
    """What a client is told `at` so many seconds after the job's start."""

    at: float
    progress: float
    eta: float | None
    done: int


@dataclass(frozen=True)
class Score:
    """Errors by point (%; None: no ETA), the longest standstill (share), and the first chunk's ETA over the truth."""

    seconds: float
    errors: list[float | None]
    standstill: float
    falls: int
    first_chunk: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, ExitStack() as everything:
        folder = Path(name)
        data = data_of(parsed.data, parsed.quick, folder)
        processes = start(folder, everything)
        processes.start("train")
        processes.alive(2)
        dataset = _dataset(processes, data)
        for title in ("first training", "training beside a champion"):
            scores[title] = _followed(processes, _training(processes, dataset, parsed))
        scans = _scans(processes, folder, 40 if parsed.quick else parsed.scans)
        for title in ("first batch of a cold stack", "second batch"):
            scores[title] = _followed(processes, _batch(processes, scans, 8 if parsed.quick else None))
    return _report(scores, quick=parsed.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.eta", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a zip with one folder a class")
    parser.add_argument("--quick", action="store_true", help="few synthetic scans: does it run at all")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--scans", type=int, default=1200, help="of a batch")
    return parser


# --- jobs ---


def _dataset(processes: Stack, archive: Path) -> uuid.UUID:
    blob = BlobStore(processes.settings.artifacts).put_file(archive)
    with processes.sessions.begin() as session:
        dataset = Dataset(tenant_id=TENANT, name="bench", archive_sha256=blob.sha256, archive_bytes=blob.size)
        session.add(dataset)
        session.flush()
        job = submit(session, NewJob(TENANT, JobKind.INGEST, Lane.BATCH, dataset_id=dataset.id))
        dataset.job_id = job.id
    assert processes.wait_for(job.id, 600).state == "succeeded", processes.logs()
    return dataset.id


def _training(processes: Stack, dataset: uuid.UUID, parsed: argparse.Namespace) -> uuid.UUID:
    params = {"network": parsed.network, "weights": "none", "epochs": parsed.epochs, "learning_rate": 0.01}
    new = NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params=params, dataset_id=dataset)
    with processes.sessions.begin() as session:
        return submit(session, new).id


def _scans(processes: Stack, folder: Path, number: int) -> list[NewResult]:
    phantom_files.write_dataset(folder / "new", patients=-(-number // 5), slices=5, seed=99)
    store = BlobStore(processes.settings.artifacts)
    with processes.sessions.begin() as session:
        blobs = {store.put_file(path).sha256 for path in sorted((folder / "new").rglob("*.png"))[:number]}
        rows = [
            Scan(tenant_id=TENANT, sha256=sha256, size=1, media_type="image/png", width=512, height=512)
            for sha256 in sorted(blobs)
        ]
        session.add_all(rows)
        session.flush()
        return [NewResult(row.id) for row in rows]


def _batch(processes: Stack, scans: Sequence[NewResult], chunk: int | None) -> uuid.UUID:
    with processes.sessions.begin() as session:
        version = session.scalars(select(ModelVersion).order_by(ModelVersion.version.desc()).limit(1)).one()
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=version.id, model_version=version.version)
        chunk = chunk or pace.chunk_size(session, Lane.BATCH, processes.settings)
        return submit(session, new, scans, chunk).id


# --- asking and scoring ---


def _followed(processes: Stack, job_id: uuid.UUID) -> Score:
    samples = list(_samples(processes, job_id))
    job = processes.job(job_id)
    assert job.state == "succeeded", (job.error, processes.logs())
    assert job.finished_at is not None
    assert job.started_at is not None
    return score(samples, (job.finished_at - job.started_at).total_seconds())


def _samples(processes: Stack, job_id: uuid.UUID) -> Iterator[Sample]:
    while True:
        with processes.sessions() as session:
            view = queries.job(session, TENANT, job_id)
        if view.terminal:
            return
        if view.job.started_at is not None:
            at = (view.now - view.job.started_at).total_seconds()
            yield Sample(at, view.progress, view.eta_seconds, view.job.succeeded)
        time.sleep(ASK_SECONDS)


def score(samples: Sequence[Sample], seconds: float) -> Score:
    """Of a job that took so many seconds."""

    def error(point: float) -> float | None:
        nearest = min(samples, key=lambda sample: abs(sample.at - point * seconds))
        truth = seconds - nearest.at
        return None if nearest.eta is None else round(100 * abs(nearest.eta - truth) / truth, 1)

    moved, longest = samples[0], 0.0
    for sample in samples:
        if sample.progress > moved.progress:
            moved = sample
        longest = max(longest, sample.at - moved.at)
    first = next((sample for sample in samples if sample.done and sample.eta), None)
    return Score(
        round(seconds, 1),
        [error(point) for point in POINTS],
        round(longest / seconds, 3),
        sum(after.progress < before.progress for before, after in pairwise(samples)),
        None if first is None or first.eta is None else round(first.eta / (seconds - first.at), 2),
    )


def _report(scores: dict[str, Score], quick: bool) -> int:
    table = Table("job", "s", *(f"error at {point:.0%}" for point in POINTS), "standstill", "first chunk's ETA/truth")
    for title, found in scores.items():
        errors = ("–" if error is None else f"{error:.0f} %" for error in found.errors)
        first = "" if found.first_chunk is None else f"{found.first_chunk:.2f}"
        table.add_row(title, f"{found.seconds:.0f}", *errors, f"{found.standstill:.1%}", first)
    medians = [
        median(found.errors[number] for found in scores.values() if found.errors[number] is not None)
        for number in range(len(POINTS))
    ]
    table.add_row("[bold]median", "", *(f"[bold]{each:.0f} %" for each in medians))
    Console().print(table)
    kept: dict[str, Any] = {title: vars(found) for title, found in scores.items()}
    out = OUT.with_stem("eta-quick") if quick else OUT
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(), "median_error": medians, "jobs": kept}, indent=1) + "\n")
    factor = scores["first batch of a cold stack"].first_chunk
    if not quick and (factor is None or not 1 / MOST_FACTOR <= factor <= MOST_FACTOR):
        Console().print(f"NOT MET: the first batch's ETA was {factor} times the truth")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
