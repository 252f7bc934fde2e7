"""`renalq up` as a user runs it, in a folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from cli.stack.server_plan import LOOPBACK, free_port
from tests.databases import ROOT
from tests.process_tree import alive, eventually, family, read_json, speaking_of

READY_SECONDS = 90
FOREIGN = ("RENALQ_DATABASE_URL", "RENALQ_REDIS_URL", "RENALQ_URL", "RENALQ_KEY", "RENALQ_MLFLOW_URL")


class RunningStack:
    """One `renalq up`.

    Args:
        settings: environment variables beside its home and port.
    """

    def __init__(self, home: Path, *options: str, port: int | None = None, **settings: str) -> None:
        self.home, self.port = home, port or free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._settings = settings
        self.output = home.with_name(f"{home.name}.out")
        with self.output.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli", "up", *options],
                cwd=ROOT,
                env=self.environ(),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def environ(self) -> dict[str, str]:
        """The environment of its commands."""
        ours = {"RENALQ_HOME": str(self.home), "RENALQ_PORT": str(self.port), "RENALQ_DEV_FSYNC": "off"}
        return {name: value for name, value in os.environ.items() if name not in FOREIGN} | ours | self._settings

    def ready(self) -> RunningStack:
        """Wait until it says that it is ready."""
        eventually(self._is_ready, READY_SECONDS, f"ready; it said: {self.said()}")
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        state = self.state() or {}  # that of a killed stack may still lie there
        return bool(state.get("ready")) and state["pid"] == self.process.pid

    def state(self) -> Any:
        """What stands in its stack.json; None without one."""
        return read_json(self.home / "stack.json")

    def key(self) -> str:
        """The first key."""
        return (self.home / "admin.key").read_text().strip()

    def said(self) -> str:
        """All that it has printed."""
        return self.output.read_text()

    def get(self, path: str, **headers: str) -> requests.Response:
        """GET."""
        return requests.get(self.url + path, headers=headers, timeout=10)

    def renalq(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Another command of `renalq` with this home."""
        return subprocess.run(
            [sys.executable, "-m", "cli", *command],
            env=self.environ() | environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def everyone(self) -> list[int]:
        """All its processes."""
        return family(self.process.pid)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def ends_without_a_trace(self, number: signal.Signals = signal.SIGTERM) -> None:
        """A signal ends it with exit code 0, Postgres shuts down properly, and nothing of it is left."""
        everyone = self.everyone()
        assert self.end(number) == 0, self.said()
        assert alive(everyone) == []
        assert speaking_of(self.home) == []
        assert "database system is shut down" in (self.home / "logs" / "postgres.log").read_text()
        assert not (self.home / "stack.json").exists()


@contextmanager
def running_stack(home: Path, **settings: str) -> Iterator[RunningStack]:
    """A stack with all its parts that is ready; at the block's end SIGTERM ends it without a trace."""
    stack = RunningStack(home, **settings)
    try:
        yield stack.ready()
        stack.ends_without_a_trace()
    finally:
        if stack.process.poll() is None:
            stack.end()
