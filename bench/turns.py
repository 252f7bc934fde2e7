"""Who waits for whom: `python -m bench.turns`. A real worker with a real VGG16 and the default settings.

Ten scans of tenant B alone; then behind ten thousand of tenant A. And an urgent scan behind the ten thousand: from its
submit to its claim, against the time of one chunk. Medians of several rounds; the rounds come at random moments of A's
chunks. Prints a table, writes bench/out/turns.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from bench.queues.stack import start
from bench.train import ROOT, machine
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import leases, lifecycle, pace
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Job, ModelVersion, Scan, Unit
from ml.image.networks import network
from ml.image.pixels.transforms import Transform
from ml.synthetic import phantom_files
from tests.processes import Stack, eventually

OUT = ROOT / "bench" / "out" / "turns.json"
A, B = "a-large-clinic", "b-small-practice"
MANY, WARM, FEW = 10_000, 200, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        processes = start(folder, everything)
        _model(processes, folder)
        scans = {tenant: _scans(processes, tenant, folder) for tenant in (A, B)}
        results = _measure(processes, scans, parsed.rounds)
    return _report(results, parsed.rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.turns")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


# --- what there is to do ---


def _model(processes: Stack, folder: Path) -> None:
    """An untrained VGG16 costs a worker what a trained one does. Both tenants have it."""
    path = folder / "model.safetensors"
    network.save(network.Model(network.build(2, seed=0), ("Normal", "Tumor"), Transform(224, 224)), path)
    for tenant in (A, B):
        register(processes, tenant, path)


def register(processes: Stack, tenant: str, path: Path) -> tuple[uuid.UUID, int]:
    """A model file as the tenant's champion: id and number of its version."""
    blob = BlobStore(processes.settings.artifacts).put_file(path)
    with processes.sessions.begin() as session:
        job = submit(session, NewJob(tenant, JobKind.TRAIN, Lane.TRAIN))
        unit = session.scalars(select(Unit).where(Unit.job_id == job.id)).one()
        held = leases.claim(session, unit.id, "bench", 45)
        assert held is not None
        scores = {"f1": 1.0, "recall": 1.0, "ece": 0.0, "ece_chance": 0.0}
        new = NewModel(blob.sha256, ["Normal", "Tumor"], {}, scores, None, None)
        version = promotion.register(session, held, new, GatePolicy())
        lifecycle.succeed(session, held)
        return version.id, version.version


def _scans(processes: Stack, tenant: str, folder: Path) -> list[uuid.UUID]:
    """Slices of 512 × 512: forty pictures, each in as many files as it takes, since equal files are one scan."""
    phantom_files.write_dataset(folder / tenant, patients=10, slices=4, seed=1)
    pictures = [path.read_bytes() for path in sorted((folder / tenant).rglob("*.png"))]
    paths = [folder / tenant / f"{number}.png" for number in range(MANY if tenant == A else WARM)]
    for number, path in enumerate(paths):
        path.write_bytes(pictures[number % len(pictures)] + str(number).encode())  # behind its end a PNG may hold more
    return keep(processes, tenant, paths, "image/png")


def keep(processes: Stack, tenant: str, paths: Sequence[Path], media_type: str) -> list[uuid.UUID]:
    """Files of 512 × 512 as the tenant's stored scans: their ids."""
    store, ids = BlobStore(processes.settings.artifacts), []
    with processes.sessions.begin() as session:
        for path in paths:
            blob = store.put_file(path)
            scan = Scan(
                tenant_id=tenant, sha256=blob.sha256, size=blob.size, media_type=media_type, width=512, height=512
            )
            session.add(scan)
            session.flush()
            ids.append(scan.id)
    return ids


def _submit(processes: Stack, tenant: str, scan_ids: Sequence[uuid.UUID], number: int, urgent: bool = False) -> Job:
    kind, lane = (JobKind.PREDICT, Lane.URGENT) if urgent else (JobKind.PREDICT_BATCH, Lane.BATCH)
    with processes.sessions.begin() as session:
        model = session.scalars(select(ModelVersion).where(ModelVersion.tenant_id == tenant)).one()
        new = NewJob(tenant, kind, lane, model_id=model.id, model_version=model.version)
        scans = [NewResult(scan_id) for scan_id in scan_ids[:number]]
        return submit(session, new, scans, processes.settings.chunk_scans)


def _seconds(processes: Stack, job: Job) -> float:
    """From its row to its end, by Postgres' clock."""
    ended = processes.wait_for(job.id, 120)
    assert ended.state == "succeeded", (ended.error, processes.logs())
    assert ended.finished_at is not None
    return (ended.finished_at - ended.created_at).total_seconds()


# --- the measurement ---


def _measure(processes: Stack, scans: dict[str, list[uuid.UUID]], rounds: int) -> dict[str, list[float]]:
    _seconds(processes, _submit(processes, B, scans[B], WARM))  # the network is loaded, all is warm
    found: dict[str, list[float]] = {"alone": [], "behind": [], "urgent_starts": [], "chunk": []}
    for _ in range(rounds):
        time.sleep(processes.settings.newcomer_seconds + 1)
        found["alone"].append(_seconds(processes, _submit(processes, B, scans[B], FEW)))
    large = _submit(processes, A, scans[A], MANY)
    eventually(lambda: processes.job(large.id).succeeded > 0, 60, processes.logs)
    pick = random.Random(0)
    for _ in range(rounds):
        time.sleep(processes.settings.newcomer_seconds + 1 + pick.uniform(0, 3))
        found["behind"].append(_seconds(processes, _submit(processes, B, scans[B], FEW)))
        time.sleep(pick.uniform(1, 3))
        urgent = processes.wait_for(_submit(processes, A, scans[A], 1, urgent=True).id, 60)
        assert urgent.started_at is not None
        found["urgent_starts"].append((urgent.started_at - urgent.created_at).total_seconds())
    with processes.sessions() as session:
        found["chunk"].append(pace.mean_unit_seconds(session)[Lane.BATCH])
    assert processes.job(large.id).finished_at is None, "it was meant to be in the way"
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, A, large.id)
    processes.wait_for(large.id)
    return found


def _report(found: dict[str, list[float]], rounds: int) -> int:
    ratios = [behind / median(found["alone"]) for behind in found["behind"]]
    late = [start - found["chunk"][0] for start in found["urgent_starts"]]
    results = {
        "machine": machine(),
        "rounds": rounds,
        "seconds": {name: [round(value, 3) for value in values] for name, values in found.items()},
        "behind_to_alone_median": round(median(ratios), 2),
        "behind_to_alone_worst": round(max(ratios), 2),
        "urgent_starts_median_seconds": round(median(found["urgent_starts"]), 3),
        "urgent_starts_worst_seconds": round(max(found["urgent_starts"]), 3),
        "chunk_seconds": round(found["chunk"][0], 3),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table("who", "median s", "worst s", title=f"Behind {MANY:,} scans of another tenant")
    for name in ("alone", "behind", "urgent_starts"):
        table.add_row(name.replace("_", " "), f"{median(found[name]):.2f}", f"{max(found[name]):.2f}")
    console = Console()
    console.print(table)
    console.print(f"behind / alone: {results['behind_to_alone_median']}, at worst {results['behind_to_alone_worst']}")
    console.print(f"a chunk takes about {found['chunk'][0]:.2f} s; written: {OUT.relative_to(ROOT)}")
    return 0 if max(ratios) <= 3 and max(late) <= 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
