"""Stops, pauses and kills the processes of a stack, at random but by seed, and says what it did to whom."""

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from jobs.db import Sessions
from jobs.tables import Unit
from tests.faults.servers import Server
from tests.processes import Stack

WORKERS = ("predict", "train")
DISPATCHERS = ("dispatcher", "dispatcher2", "dispatcher3")
"""One leads, two stand by."""
PROCESSES = (*DISPATCHERS, *WORKERS)


def start(processes: Stack, name: str) -> None:
    """Start one of `PROCESSES`."""
    processes.start("dispatcher" if name in DISPATCHERS else name, name)


@dataclass(frozen=True)
class Loss:
    """A unit whose worker was killed at `at` (seconds of the epoch) while it held it under `fence`."""

    unit_id: uuid.UUID
    job_id: uuid.UUID
    attempt: int
    at: float


@dataclass
class Killer:
    """One storm's killer. Every action leaves the stack whole again after a while."""

    processes: Stack
    redis: Server
    postgres: Server
    seed: int
    mean_pause: float
    losses: list[Loss] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._pick = random.Random(self.seed)
        self._started = time.monotonic()
        self._actions: list[tuple[int, Callable[[], str]]] = [
            (6, self._kill_worker),
            (3, self._kill_pool_child),
            (3, self._pause_worker),
            (2, self._drain_worker),
            (3, self._kill_dispatcher),
            (2, self._pause_dispatcher),
            (3, self._wipe_redis),
            (2, self._pause_redis),
            (3, self._kill_backends),
            (1, self._restart_postgres),
        ]

    def rage(self, over: threading.Event) -> None:
        """Act until it is over."""
        weights = [weight for weight, _ in self._actions]
        while not over.wait(self._pick.expovariate(1 / self.mean_pause)):
            (_, action) = self._pick.choices(self._actions, weights)[0]
            name = action.__name__.strip("_")
            said = action()
            self.done[name] += 1
            self.mend()
            print(f"{time.monotonic() - self._started:7.1f} s  {name.replace('_', ' '):20} {said}", flush=True)

    def mend(self) -> None:
        """Start again what ended by itself, as any supervisor does: Celery gives up when its helper processes die."""
        for name in PROCESSES:
            if self.processes.running[name].poll() is not None:
                start(self.processes, name)
                self.done["ended_by_itself"] += 1

    # --- workers and dispatcher ---

    def _kill_worker(self) -> str:
        name = self._pick.choice(WORKERS)
        lost = self._held_by(name)
        self.processes.kill(name)
        return self._back(name, f"{name}, which held {self._note(lost)}")

    def _kill_pool_child(self) -> str:
        name = self._pick.choice(WORKERS)
        lost = self._held_by(name)
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes.running[name].pid).children():
                child.kill()
        return f"{name}'s, which held {self._note(lost)}"

    def _pause_worker(self) -> str:
        name, seconds = self._pick.choice(WORKERS), self._pick.uniform(1, 2.5 * self.processes.settings.lease_seconds)
        self.processes.pause(name)
        time.sleep(seconds)
        self.processes.resume(name)
        return f"{name} for {seconds:.1f} s"

    def _drain_worker(self) -> str:
        name = self._pick.choice(WORKERS)
        try:
            code = self.processes.stop(name)
        except Exception:  # it did not hear in 30 s: a crash like any other
            return self._back(name, f"{name}, which did not hear")
        return self._back(name, f"{name}, exit code {code}")

    def _kill_dispatcher(self) -> str:
        name = self._pick.choice(DISPATCHERS)
        self.processes.kill(name)
        return self._back(name, name)

    def _pause_dispatcher(self) -> str:
        name, seconds = self._pick.choice(DISPATCHERS), self._pick.uniform(1, 8)
        self.processes.pause(name)
        time.sleep(seconds)
        self.processes.resume(name)
        return f"{name} for {seconds:.1f} s"

    def _back(self, name: str, said: str) -> str:
        seconds = self._pick.uniform(0, 2)
        time.sleep(seconds)
        start(self.processes, name)
        return f"{said}; back after {seconds:.1f} s".lstrip("; ")

    # --- servers ---

    def _wipe_redis(self) -> str:
        self.redis.kill()
        self.redis.wipe()
        time.sleep(self._pick.uniform(0, 3))
        self.redis.start()
        return "killed, emptied, back"

    def _pause_redis(self) -> str:
        seconds = self._pick.uniform(1, 10)
        self.redis.pause()
        time.sleep(seconds)
        self.redis.resume()
        return f"for {seconds:.1f} s"

    def _kill_backends(self) -> str:
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE :whose"
        whose = self._pick.choice(["renalq-worker", "renalq-beat", "renalq-api", "renalq%"])
        with suppress(SQLAlchemyError), self.processes.sessions() as session:  # ours may be among them
            return f"{session.scalar(text(ended + ' AND pid <> pg_backend_pid()'), {'whose': whose})} of {whose}"
        return f"all of {whose}"

    def _restart_postgres(self) -> str:
        self.postgres.quit()
        time.sleep(self._pick.uniform(0, 2))
        self.postgres.start()
        return "at once, without a farewell"

    # --- what a kill cost ---

    def _held_by(self, name: str) -> list[Loss]:
        with suppress(SQLAlchemyError), self.processes.sessions() as session:
            of_worker = Unit.worker.like(f"{name}@%")
            rows = session.scalars(select(Unit).where(Unit.state == "running", of_worker)).all()
            return [Loss(row.id, row.job_id, row.attempt, time.time()) for row in rows]
        return []

    def _note(self, lost: list[Loss]) -> str:
        self.losses += lost
        return f"{len(lost)} unit{'' if len(lost) == 1 else 's'}"


def recoveries(sessions: Sessions, losses: list[Loss]) -> list[float]:
    """Seconds from each killing until its unit was taken back (or had, after all, ended)."""
    question = text(
        "SELECT extract(epoch FROM min(at)) FROM job_events WHERE job_id = :job AND at > to_timestamp(:at) AND ("
        " type IN ('requeued', 'succeeded', 'partially_succeeded', 'failed', 'cancelled')"
        " AND coalesce((data ->> 'attempt')::int, :attempt) = :attempt)"
    )
    with sessions() as session:
        asked = [{"job": loss.job_id, "at": loss.at, "attempt": loss.attempt} for loss in losses]
        found = [(loss, session.scalar(question, values)) for loss, values in zip(losses, asked, strict=True)]
    return [float(back) - loss.at for loss, back in found if back is not None]
