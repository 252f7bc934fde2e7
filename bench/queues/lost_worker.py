"""A side of `bench.dispatch`: an urgent scan behind a worker that was killed, with the default clocks.

A real dispatcher and a real Celery worker whose network answers at once. It holds a chunk of a batch when it is killed:
all of it, to be started again under its old name, or only its pool's child. The urgent scan is submitted right then.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import signal
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sqlalchemy import text

from bench.queues.checkouts import Figures, hand_in, say
from bench.queues.stack import start
from jobs.tables import Job
from tests.faults import work
from tests.faults.sabotage import Sabotage, StubNetwork
from tests.processes import Stack, eventually

PATIENCE_SECONDS, LONG_SECONDS = 180, 30
"""A measurement that takes longer than the second is not repeated."""
READY = "SELECT clock_timestamp() FROM processes WHERE kind = 'worker' AND name <> ALL (:names) LIMIT 1"
NAMES = "SELECT name FROM processes WHERE kind = 'worker'"


@dataclass(frozen=True)
class Worker:
    """The worker `predict`, and the network in it."""

    processes: Stack
    network: StubNetwork
    environ: dict[str, str]

    def hold_a_chunk(self) -> None:
        """Return when it stands in the middle of a chunk."""
        for name in ("until", "reached"):
            Path(self.network.what[name]).unlink(missing_ok=True)
        work.batch(self.processes, work.words(10, pause=5))
        eventually(self.network.paused, 60, self.processes.logs)

    def restart(self) -> float:
        """kill -9 of all of it, and a start under the same name: seconds that an urgent scan waited from when it was
        ready (it shows itself in `processes`)."""
        with self.processes.sessions() as session:
            names = list(session.scalars(text(NAMES)))
        self.processes.kill("predict")
        self.network.release()
        self.processes.start("predict", environ=self.environ)
        job_id = work.single(self.processes)
        ready = eventually(lambda: self._ready(names), PATIENCE_SECONDS, self.processes.logs)
        job = self.processes.wait_for(job_id, PATIENCE_SECONDS)
        assert job.started_at is not None
        return max(0.0, (job.started_at - ready).total_seconds())

    def _ready(self, names: list[str]) -> dt.datetime | None:
        """The time, once a worker of another name than these has shown itself."""
        with self.processes.sessions() as session:
            return session.scalar(text(READY), {"names": names})

    def kill_child(self) -> float:
        """kill -9 of the child that ran the latest unit: seconds that an urgent scan waited from then on."""
        with self.processes.sessions() as session:
            latest = text("SELECT worker FROM units WHERE worker LIKE 'predict@%' ORDER BY started_at DESC LIMIT 1")
            child = int(str(session.scalar(latest)).rpartition("/")[2])
        os.kill(child, signal.SIGKILL)
        self.network.release()
        job = self.urgent()
        assert job.started_at is not None
        return (job.started_at - job.created_at).total_seconds()

    def urgent(self) -> Job:
        """An urgent scan, to its end."""
        return self.processes.wait_for(work.single(self.processes), PATIENCE_SECONDS)

    def rest(self) -> None:
        """Return when nothing is left to do."""
        unfinished = text("SELECT id FROM jobs WHERE finished_at IS NULL")
        with self.processes.sessions() as session:
            left: list[uuid.UUID] = list(session.scalars(unfinished))
        for job_id in left:
            self.processes.wait_for(job_id, PATIENCE_SECONDS)


def main() -> None:
    """Measure, each several times unless it takes long."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {"restarted": [], "child": [], "idle_child": []}
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        plan = Sabotage(folder)
        network = plan.network()
        worker = Worker(start(folder, everything, plan.environ()), network, plan.environ())
        worker.urgent()
        for name, waits in found.items():
            _measure(worker, name, waits, rounds)
    hand_in(_figures(found))


def _measure(worker: Worker, name: str, waits: list[float], rounds: int) -> None:
    while len(waits) < rounds and max(waits, default=0) < LONG_SECONDS:
        say(f"an urgent scan behind a killed worker: {name}")
        if name != "idle_child":
            worker.hold_a_chunk()
        waits.append(worker.restart() if name == "restarted" else worker.kill_child())
        worker.rest()
        time.sleep(1)


def _figures(found: dict[str, list[float]]) -> Figures:
    """A child that was idle when it was killed shows how long a new one takes to start."""
    return {
        "seconds": {name: [round(wait, 2) for wait in waits] for name, waits in found.items()},
        "restarted_from_ready": round(median(found["restarted"]), 2),
        "child_from_kill": round(median(found["child"]), 2),
        "idle_child_from_kill": round(median(found["idle_child"]), 2),
    }


if __name__ == "__main__":
    main()
