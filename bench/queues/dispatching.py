"""A side of `bench.dispatch`: a hundred simulated workers, and real dispatchers.

Looks are counted in Postgres' log, which also shows them where a dispatcher dies; units and connections are sampled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from sqlalchemy import Connection, Engine, text

from bench.queues.checkouts import Figures, hand_in, say
from bench.queues.databases import migrated
from bench.queues.fleet import Fleet
from cli.stack.embedded import embedded_postgres, embedded_redis
from jobs.db import Sessions, session_factory
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane
from tests.processes import eventually

SAMPLE_SECONDS, IDLE_SECONDS, RAMP_SECONDS = 0.02, 3.0, 45.0
TENANTS, LOAD_HOLD = 20, (0.5, 1.5)
LOOK = b"EXECUTE snapshot"
SAMPLE = text("""
SELECT (SELECT count(*) FROM units WHERE state = 'dispatched' AND rings > 0) AS dispatched,
    (SELECT count(*) FROM units WHERE state = 'running') AS running,
    (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'renalq%') AS connections
""")
LEADER = """
SELECT client_port FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND application_name LIKE 'renalq%' LIMIT 1
"""
MORE_UNITS = """
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings)
SELECT uuidv7(), :tenant, :job, n, 'batch', 'queued', 0, 0, 0 FROM generate_series(1, :more) AS n
"""


@dataclass(frozen=True)
class Sample:
    """What was so at a time: units with a message that nobody has claimed, units at work, looks so far."""

    at: float
    dispatched: int
    running: int
    connections: int
    looks: int


class Log:
    """Counts looks in the log of Postgres."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._looks = path, 0, 0

    def looks(self) -> int:
        """How many there have been since the start."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        self._looks += whole.count(LOOK)
        return self._looks


@dataclass
class Watch:
    """Samples, taken by a thread."""

    engine: Engine
    log: Log
    samples: list[Sample] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Sample for the length of the block."""
        ended = threading.Event()
        thread = threading.Thread(target=self._sample_until, args=(ended,))
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()

    def until(self, condition: Callable[[Sample], bool], seconds: float) -> Sample | None:
        """The first sample from now on that the condition holds for; None if there was none in time."""
        seen, deadline = len(self.samples), time.monotonic() + seconds
        while time.monotonic() < deadline:
            for sample in self.samples[seen:]:
                seen += 1
                if condition(sample):
                    return sample
            time.sleep(SAMPLE_SECONDS)
        return None

    def _sample_until(self, ended: threading.Event) -> None:
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not ended.wait(SAMPLE_SECONDS):
                self.samples.append(self._sample(connection))

    def _sample(self, connection: Connection) -> Sample:
        row = connection.execute(SAMPLE).one()
        return Sample(time.monotonic(), row.dispatched, row.running, row.connections, self.log.looks())


@dataclass(frozen=True)
class Side:
    """All that a measurement needs."""

    sessions: Sessions
    watch: Watch
    fleet: Fleet
    environ: dict[str, str]
    logs: Path


def main() -> None:
    """Measure with each number of dispatchers."""
    parsed = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name:
        folder = Path(name)
        with embedded_postgres(folder) as server, embedded_redis(folder / "redis") as redis:
            url = migrated(server, "bench")
            sessions = session_factory(url, pool_size=3, application="bench")
            _log_statements(sessions)
            environ = {"RENALQ_DATABASE_URL": url, "RENALQ_REDIS_URL": redis, "RENALQ_HOME": name}
            watch = Watch(sessions.kw["bind"], Log(folder / "logs" / "postgres.log"))
            with Fleet(url, redis, parsed.workers).working() as fleet:
                side = Side(sessions, watch, fleet, os.environ | environ, folder)
                found = {str(number): _measure(side, number, parsed) for number in parsed.dispatchers}
    hand_in(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int)
    parser.add_argument("--dispatchers", type=int, nargs="+")
    parser.add_argument("--units", type=int)
    parser.add_argument("--load", type=int)
    return parser


def _log_statements(sessions: Sessions) -> None:
    """For connections from now on."""
    with sessions.begin() as session:
        name = session.scalar(text("SELECT current_database()"))
        session.execute(text(f"ALTER DATABASE {name} SET log_statement = 'all'"))


def _measure(side: Side, number: int, parsed: argparse.Namespace) -> Figures:
    side.watch.samples.clear()
    with _dispatchers(side, number) as started, side.watch.watching():
        say(f"{number} dispatchers: idle, a batch, many tenants, one killed")
        found = {**_idle(side), **_ramp(side, parsed.units), **_load(side, parsed.load)}
        found["connections"] = max(sample.connections for sample in side.watch.samples)
        if number > 1:
            found["seconds_until_claim_after_kill"] = _takeover(side, started)
    return found


@contextmanager
def _dispatchers(side: Side, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many, all of which have shown that they live."""
    command = [sys.executable, "-m", "worker.dispatcher"]
    with (side.logs / "dispatchers.log").open("ab") as log:
        started = [subprocess.Popen(command, env=side.environ, stdout=log, stderr=log) for _ in range(number)]
    try:
        eventually(lambda: _count(side, "processes WHERE kind = 'dispatcher'") >= number, 120)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait(10)
        with side.sessions.begin() as session:
            session.execute(text("DELETE FROM processes WHERE kind = 'dispatcher'"))


# --- the measurements ---


def _idle(side: Side) -> Figures:
    time.sleep(IDLE_SECONDS)
    return {"looks_per_second_idle": _looks_per_second(side.watch.samples)}


def _ramp(side: Side, units: int) -> Figures:
    """One batch: until all work. Nobody is done before."""
    side.fleet.release.clear()
    side.fleet.hold = (2 * RAMP_SECONDS, 2 * RAMP_SECONDS)
    looks, began, size = side.watch.samples[-1].looks, time.monotonic(), side.fleet.size
    first = len(side.watch.samples)
    _submit(side, "a-large-clinic", units)
    at_work = side.watch.until(lambda sample: sample.running >= size, RAMP_SECONDS)
    mine = side.watch.samples[first:]
    dispatched = next((sample for sample in mine if sample.dispatched + sample.running >= size), None)
    side.fleet.release.set()
    eventually(lambda: _count(side, "units WHERE finished_at IS NULL") == 0, 60)
    return {
        "seconds_until_all_work": round(at_work.at - began, 2) if at_work else None,
        "looks_until_all_dispatched": dispatched.looks - looks if dispatched else None,
        "at_work_after_45_s": max(sample.running for sample in mine),
        "beyond_idle_batch": _beyond(side, mine),
    }


def _load(side: Side, units: int) -> Figures:
    """Many tenants with more units than workers, whose ends wake the dispatchers all the time."""
    side.fleet.hold = LOAD_HOLD
    side.fleet.release.clear()
    first, began = len(side.watch.samples), time.monotonic()
    for number in range(TENANTS):
        _submit(side, f"tenant-{number}", units // TENANTS)
    eventually(lambda: _count(side, "units WHERE finished_at IS NULL") == 0, 120)
    mine, taken = side.watch.samples[first:], time.monotonic() - began
    return {
        "beyond_idle_tenants": _beyond(side, mine),
        "samples_beyond_idle": round(fmean(_excess(side, sample) > 0 for sample in mine), 3),
        "looks_per_second_load": _looks_per_second(mine),
        "seconds_of_load": round(taken, 2),
        "share_of_workers_busy": round(units * fmean(LOAD_HOLD) / taken / side.fleet.size, 3),
    }


def _takeover(side: Side, started: list[subprocess.Popen[bytes]]) -> float:
    """kill -9 of the dispatcher that leads (of any, where none does), until a job submitted then is claimed."""
    side.fleet.hold = (0.0, 0.0)
    with side.sessions.begin() as session:
        port = session.scalar(text(LEADER))
    leads = [process for process in started if port in _ports(process.pid)]
    (leads or started)[0].kill()
    began = time.monotonic()
    job_id = _submit(side, "after-the-kill", 1)
    eventually(lambda: _count(side, f"jobs WHERE id = '{job_id}' AND started_at IS NOT NULL"), 60)
    return round(time.monotonic() - began, 2)


def _ports(pid: int) -> set[int]:
    return {connection.laddr.port for connection in psutil.Process(pid).net_connections("tcp")}


def _submit(side: Side, tenant: str, units: int) -> Any:
    with side.sessions.begin() as session:
        job = submit(session, NewJob(tenant, JobKind.INGEST, Lane.BATCH))
        session.execute(text("UPDATE jobs SET total = :units WHERE id = :job"), {"units": units, "job": job.id})
        session.execute(text(MORE_UNITS), {"tenant": tenant, "job": job.id, "more": units - 1})
        # The job's end takes its total from its tenant's load.
        load = text("UPDATE tenant_loads SET scans = scans + :more WHERE tenant_id = :tenant")
        session.execute(load, {"more": units - 1, "tenant": tenant})
        return job.id


def _beyond(side: Side, samples: list[Sample]) -> int:
    return max(0, max(_excess(side, sample) for sample in samples))


def _excess(side: Side, sample: Sample) -> int:
    """Units with a message beyond those that idle workers take."""
    return sample.dispatched - (side.fleet.size - sample.running)


def _looks_per_second(samples: list[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return round((last.looks - first.looks) / (last.at - first.at), 1)


def _count(side: Side, rows: str) -> int:
    with side.sessions() as session:
        return int(session.scalar(text(f"SELECT count(*) FROM {rows}")) or 0)  # noqa: S608


if __name__ == "__main__":
    main()
