"""What the guards cost: `python -m bench.queue`. Ours beside bare Celery and Procrastinate, on one Redis and Postgres.

Idle latency: from the submit's commit (for bare Celery, whose publish is all there is: from before it) to the worker's
first line. Throughput: empty units through one worker process, from the first to the last of them. A durable queue must
also commit an INSERT and an UPDATE: these are measured on the same Postgres and added to bare Celery for the bound.
Rounds in turn, since a machine's speed drifts. Prints a table, writes bench/out/queue.json.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import psycopg2
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from bench.peers.empty import ADDRESS
from bench.train import ROOT, machine
from cli.stack.embedded import embedded_postgres, embedded_redis
from jobs.db import Sessions, session_factory
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane

OUT = ROOT / "bench" / "out" / "queue.json"
BOUND = 1.25
"""Most times that ours may take what bare Celery, an INSERT and an UPDATE take together."""
PAUSE_SECONDS = 0.03
"""Between two messages of the idle run: everybody is waiting again by then."""


class Ear:
    """Hears the workers' first lines, in nanoseconds of the machine's monotonic clock."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)

    def hear(self, patience: float = 60.0) -> int:
        """The next first line."""
        if not select.select([self._socket], [], [], patience)[0]:
            raise TimeoutError(f"No worker spoke for {patience:.0f} s.")
        return int(self._socket.recv(64))


@dataclass
class Side:
    """One queue: how to give it work and which processes do it."""

    name: str
    send: Callable[[int], None]
    processes: Sequence[Sequence[str]]
    latencies_ms: list[float] = field(default_factory=list)
    per_second: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sides in turn and report."""
    parsed = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        os.environ["RENALQ_DATABASE_URL"] = servers.enter_context(embedded_postgres(folder / "postgres"))
        os.environ["RENALQ_REDIS_URL"] = servers.enter_context(embedded_redis(folder / "redis"))
        os.environ |= {"RENALQ_HOME": name, ADDRESS: str(folder / "ear"), "RENALQ_LOG_LEVEL": "WARNING"}
        ear, sides = Ear(folder / "ear"), _sides()
        commits: list[float] = []
        for number in range(parsed.rounds):
            commits += durable_commits(parsed.messages)
            for side in sides:
                Console().print(f"round {number + 1}/{parsed.rounds}: {side.name}")
                with running(side, folder / f"{side.name}.log"):
                    idle(side, ear, parsed.messages)
                fill_and_empty(side, ear, parsed.units, folder / f"{side.name}.log")
    return report(sides, commits, parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.queue")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, default=100, help="messages of each idle run")
    parser.add_argument("--units", type=int, default=1000, help="units of each throughput run")
    return parser


# --- the sides ---


def _sides() -> list[Side]:
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], cwd=ROOT, check=True)
    return [_bare_celery(), _procrastinate(), _ours()]


def _bare_celery() -> Side:
    from bench.peers.empty.bare_celery import empty

    worker = ["-m", "celery", "-A", "bench.peers.empty.bare_celery", "worker", "-c", "1", *QUIET]
    return Side("bare celery", lambda count: [empty.delay() for _ in range(count)] and None, [worker])


def _procrastinate() -> Side:
    from bench.peers.empty.with_procrastinate import app, empty

    with app.open():
        app.schema_manager.apply_schema()
    app.open()
    worker = ["-m", "procrastinate", "-a", "bench.peers.empty.with_procrastinate.app", "worker", "--concurrency", "1"]

    def send(count: int) -> None:
        empty.batch_defer(*({} for _ in range(count)))

    return Side("procrastinate", send, [worker])


def _ours() -> Side:
    sessions: Sessions = session_factory(os.environ["RENALQ_DATABASE_URL"], application="bench")
    worker = ["-m", "celery", "-A", "bench.peers.empty.ours", "worker", "-Q", "urgent,batch", "-c", "1"]
    worker += ["-I", "bench.peers.empty.ours", "-n", "predict@bench", *QUIET]

    def send(count: int) -> None:
        with sessions.begin() as session:
            for _ in range(count):
                submit(session, NewJob("bench", JobKind.INGEST, Lane.BATCH))

    return Side("renalq", send, [["-m", "worker.dispatcher"], worker])


QUIET = ["--without-gossip", "--without-mingle", "-l", "WARNING"]


@contextmanager
def running(side: Side, log: Path) -> Iterator[None]:
    """The side's processes, for the length of the block."""
    with log.open("ab") as file:
        started = [
            subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
            for command in side.processes
        ]
    try:
        yield
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


# --- the measurements ---


def idle(side: Side, ear: Ear, messages: int) -> None:
    """One message at a time, when nothing else is to be done; the first ones only warm up."""
    for number in range(messages + 10):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        side.send(1)
        sent = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        heard = ear.hear()
        if number >= 10:
            side.latencies_ms.append((heard - (before if side.name == "bare celery" else sent)) / 1e6)
        time.sleep(PAUSE_SECONDS)


def fill_and_empty(side: Side, ear: Ear, units: int, log: Path) -> None:
    """All units wait before the worker starts; counted from the first one's first line to the last one's."""
    side.send(units)
    with running(side, log):
        first = last = ear.hear()
        for _ in range(units - 1):
            last = ear.hear()
        side.per_second.append((units - 1) / ((last - first) / 1e9))
        time.sleep(0.5)  # the last unit's end is still to be written


def durable_commits(count: int) -> list[float]:
    """Milliseconds of an INSERT and an UPDATE, each with its commit, on a table with a primary key alone."""
    url = make_url(os.environ["RENALQ_DATABASE_URL"]).set(drivername="postgresql")
    taken: list[float] = []
    connection = psycopg2.connect(url.render_as_string(hide_password=False))
    cursor = connection.cursor()
    cursor.execute("CREATE TABLE IF NOT EXISTS durable (id bigserial PRIMARY KEY, state text)")
    connection.commit()
    for _ in range(count):
        started = time.perf_counter()
        cursor.execute("INSERT INTO durable (state) VALUES ('queued') RETURNING id")
        (key,) = cursor.fetchone() or (None,)
        connection.commit()
        cursor.execute("UPDATE durable SET state = 'running' WHERE id = %s", (key,))
        connection.commit()
        taken.append((time.perf_counter() - started) * 1e3)
        time.sleep(PAUSE_SECONDS / 3)
    connection.close()
    return taken


# --- the report ---


def report(sides: Sequence[Side], commits: Sequence[float], parsed: argparse.Namespace) -> int:
    """Print the table and write the figures. The exit code says whether the bounds hold."""
    of = {side.name: side for side in sides}
    bound = median(of["bare celery"].latencies_ms) + median(commits)
    latency = median(of["renalq"].latencies_ms) / bound
    throughput = median(of["renalq"].per_second) / median(of["procrastinate"].per_second)
    results = {
        "machine": machine(),
        "rounds": parsed.rounds,
        "insert_and_update_ms": round(median(commits), 3),
        "sides": {side.name: _figures(side) for side in sides},
        "latency_ratio": round(latency, 3),
        "throughput_ratio": round(throughput, 3),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _show(sides, results, bound)
    return 0 if latency <= BOUND and throughput > 1 else 1


def _figures(side: Side) -> dict[str, float]:
    return {
        "latency_median_ms": round(median(side.latencies_ms), 3),
        "latency_p95_ms": round(quantiles(side.latencies_ms, n=20)[-1], 3),
        "units_per_second": round(median(side.per_second), 1),
    }


def _show(sides: Sequence[Side], results: dict[str, object], bound: float) -> None:
    table = Table("queue", "median ms", "p95 ms", "units/s", title="An empty unit, one worker process")
    for side in sides:
        table.add_row(side.name, *(f"{figure:.1f}" for figure in _figures(side).values()))
    console = Console()
    console.print(table)
    console.print(f"bare Celery + INSERT + UPDATE: {bound:.2f} ms; ours is {results['latency_ratio']} times that")
    console.print(f"throughput: {results['throughput_ratio']} times Procrastinate's")
    console.print(f"written: {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
