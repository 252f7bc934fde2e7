"""Starts services in order, watches them, and stops them in the reverse order.

Our own, because the ready-made ones stop all processes at once: workers must be able to hand their units back to
Postgres before Postgres goes. Single-threaded on purpose (see `cli.stack.launch` on PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from cli.stack import launch, orphan_reaper
from cli.stack.orphan_reaper import Stage

TICK_SECONDS = 0.1
MOST_RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopAskedError(Exception):
    """A signal asks the whole stack to stop in good order."""


class ServiceDiedError(Exception):
    """A service ended that must not; the message says which one, and where its log is."""


@dataclass(frozen=True)
class Service:
    """One long-running process of the stack."""

    name: str
    command: list[str]
    stage: Stage
    environ: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0
    restarts: bool = False
    """Workers run native code and are expected to die; of everything else one death ends the stack."""


@dataclass
class _Child:
    service: Service
    process: subprocess.Popen[bytes]
    deaths: deque[float] = field(default_factory=deque)


class Supervisor:
    """Holds the children of one `renalq up`. A context manager: leaving it, however, stops every one."""

    def __init__(
        self,
        logs: Path,
        folder: Path,
        lock: int,
        report: Callable[[str], None],
    ) -> None:
        """`folder` is the children's working folder, `lock` the descriptor of the held lock file."""
        self.token = secrets.token_hex(8)
        self._logs, self._folder, self._lock, self._report = logs, folder, lock, report
        self._children: dict[str, _Child] = {}
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._ask_to_stop)
        self._guardian = orphan_reaper.start(self.token, self._lock)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_everything()
        orphan_reaper.dismiss(self._guardian)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)  # acted on at the next tick, never in the middle of a start

    def log(self, name: str) -> Path:
        """The log file of a service."""
        return self._logs / f"{name}.log"

    def pids(self) -> dict[str, int]:
        """Process ids by service."""
        return {name: child.process.pid for name, child in self._children.items()}

    def start(self, service: Service) -> subprocess.Popen[bytes]:
        """Start a service; its death will be noticed by every later wait."""
        process = self._launch(service)
        known = self._children.get(service.name)
        self._children[service.name] = _Child(service, process, known.deaths if known else deque())
        return process

    def _launch(self, service: Service) -> subprocess.Popen[bytes]:
        environ = {**os.environ, **service.environ, **orphan_reaper.mark(self.token, service.stage)}
        return launch.start(service.command, self.log(service.name), environ, self._folder)

    def run(self, service: Service, seconds: float) -> None:
        """Run a one-shot command to its end. Raises `ServiceDiedError` if it fails or takes too long."""
        process = self._launch(service)
        try:
            self.wait_for(lambda: process.poll() is not None, f"{service.name} to end", seconds)
        finally:
            launch.stop(process, signal.SIGTERM, grace_seconds=3)
        if process.returncode != 0:
            raise ServiceDiedError(self._obituary(service.name, process.returncode))

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for a condition while watching all children. Raises `ServiceDiedError` after `seconds`."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise ServiceDiedError(f"Waited {seconds:.0f} s for {what} in vain; the logs are in {self._logs}")
            self.tick()

    def watch(self) -> None:
        """Watch for ever: ends by `StopAskedError` or `ServiceDiedError` only."""
        while True:
            self.tick()

    def tick(self) -> None:
        """One look at signals and children, and a short sleep."""
        if self._asked is not None:
            raise StopAskedError(self._asked.name)
        for child in list(self._children.values()):
            if child.process.poll() is not None:
                self._mourn(child)
        time.sleep(TICK_SECONDS)

    def _mourn(self, child: _Child) -> None:
        name, now = child.service.name, time.monotonic()
        launch.signal_group(child.process.pid, signal.SIGKILL)  # what the dead one left
        obituary = self._obituary(name, child.process.returncode)
        if not child.service.restarts:
            raise ServiceDiedError(obituary)
        child.deaths.append(now)
        while child.deaths[0] < now - RESTART_WINDOW_SECONDS:
            child.deaths.popleft()
        if len(child.deaths) > MOST_RESTARTS:
            raise ServiceDiedError(f"{obituary}; it did so {len(child.deaths)} times within a minute")
        self._report(f"{obituary}; starting it again")
        self.start(child.service)

    def _obituary(self, name: str, status: int) -> str:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        last = launch.last_line(self.log(name))
        return f"{name} {how} (log: {self.log(name)}{', which ends: ' + last[:200] if last else ''})"

    def _stop_everything(self) -> None:
        for stage in sorted(Stage, reverse=True):
            children = [child for child in self._children.values() if child.service.stage == stage]
            launch.stop_all(
                [(child.process, child.service.stop_signal, child.service.grace_seconds) for child in children]
            )
        # What went off into a session of its own (a training's child process) has the mark still.
        orphan_reaper.sweep(self.token, Stage.SERVERS, signal.SIGTERM, grace_seconds=2)
