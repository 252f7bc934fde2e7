"""Real processes for tests: a dispatcher and Celery workers on the test's own Postgres and Redis, with short clocks."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from sqlalchemy import text

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Job

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
"""Real scans and tables beside the project, which not every machine has."""
T = TypeVar("T")


def small_settings(home: Path, database_url: str, redis_url: str) -> Settings:
    """Settings with short clocks."""
    return Settings(
        home=home,
        database_url=database_url,
        redis_url=redis_url,
        lease_seconds=2,
        beat_seconds=0.5,
        give_up_seconds=1.5,
        sweep_seconds=0.2,
        ring_again_seconds=1,
        process_seconds=0.5,
        retry_base_seconds=0.1,
        fetch_hosts="example.org,127.0.0.1:9",  # nobody answers at the second
        rate_failed_login="",  # the counters of all tests are in one Redis, and their address is the same
    )


@dataclass
class Stack:
    """The processes of one test. Each may be killed and started again."""

    settings: Settings
    sessions: Sessions
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self, name: str, alias: str = "", environ: Mapping[str, str] | None = None) -> None:
        """Start `dispatcher`, `predict` or `train`; its log is HOME/NAME.log.

        Args:
            alias: its name here and to Celery, where several of a kind run.
            environ: beside the settings; `tests.faults.sabotage` makes one.
        """
        alias = alias or name
        commands = {
            "dispatcher": ["-m", "worker.dispatcher"],
            "predict": _celery(alias, "urgent,batch"),
            "train": _celery(alias, "train"),
        }
        with (self.settings.home / f"{alias}.log").open("ab") as log:
            self.running[alias] = subprocess.Popen(
                [sys.executable, *commands[name]],
                cwd=ROOT,
                env={**self.environ(), **(environ or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ensure(self, *names: str) -> None:
        """Start those that do not run."""
        for name in names:
            if name in self.running and self.running[name].poll() is not None:
                self.kill(name)
            if name not in self.running:
                self.start(name)

    def kill(self, name: str) -> None:
        """kill -9 of the whole tree, children that moved to other sessions too."""
        started = self.running.pop(name)
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(started.pid)
            for process in [parent, *parent.children(recursive=True)]:
                process.kill()
        started.wait(10)

    def stop(self, name: str) -> int:
        """SIGTERM, and the exit code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(30)

    def pause(self, name: str) -> None:
        """SIGSTOP to the whole tree."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT to the whole tree."""
        self._signal(name, signal.SIGCONT)

    def log(self, name: str) -> str:
        """All that a process and its children have logged."""
        return (self.settings.home / f"{name}.log").read_text()

    def alive(self, workers: int = 1) -> None:
        """Wait until so many workers have shown that they live."""
        question = "SELECT count(*) FROM processes WHERE kind = 'worker'"
        eventually(lambda: count(self.sessions, question) >= workers, 60, self.logs)

    def _signal(self, name: str, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.running[name].pid)
            for process in [parent, *parent.children(recursive=True)]:
                process.send_signal(number)

    def environ(self) -> dict[str, str]:
        """The settings as environment variables."""
        fields = self.settings.model_dump(mode="json", exclude_none=True)
        return {**os.environ, **{f"RENALQ_{name.upper()}": str(value) for name, value in fields.items()}}

    def job(self, job_id: uuid.UUID) -> Job:
        """The job's row now."""
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def wait_for(self, job_id: uuid.UUID, seconds: float = 60) -> Job:
        """The job, once it has ended."""
        return eventually(lambda: job if (job := self.job(job_id)).finished_at else None, seconds, self.logs)

    def logs(self) -> str:
        """The last lines of every log, for a failed test's message."""
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.settings.home.glob("*.log")))


def _celery(name: str, queues: str) -> list[str]:
    arguments = ["-m", "celery", "-A", "worker.app", "worker", "-Q", queues, "-c", "1", "-n", f"{name}@test"]
    return [*arguments, "--without-gossip", "--without-mingle", "-l", "INFO"]


@contextmanager
def stack(settings: Settings, sessions: Sessions, *names: str) -> Iterator[Stack]:
    """Processes that do not outlive the block."""
    processes = Stack(settings, sessions)
    try:
        for name in names:
            processes.start(name)
        yield processes
    finally:
        for name in list(processes.running):
            processes.kill(name)


def eventually(question: Callable[[], T | None], seconds: float = 30, why: Callable[[], str] = str) -> T:
    """The first answer that is not None or False; a failed test when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"It did not come about within {seconds} s.\n{why()}")
        time.sleep(0.05)


def count(sessions: Sessions, question: str) -> int:
    """A number from the database."""
    with sessions() as session:
        return int(session.execute(text(question)).scalar() or 0)
