"""Start services in order, watch them, and stop them in the reverse order.

Written here because existing process managers stop all processes at once: workers must hand their units back before
Postgres stops. Single-threaded on purpose (see `cli.stack.launch` on PR_SET_PDEATHSIG).
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
MAX_RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequestedError(Exception):
    """A signal asked the whole stack to stop."""


class ServiceDiedError(Exception):
    """A service ended that must not end; the message names it and its log."""


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
    """Workers run native code and may crash; the death of any other service ends the stack."""


@dataclass
class _Child:
    service: Service
    process: subprocess.Popen[bytes]
    deaths: deque[float] = field(default_factory=deque)


class Supervisor:
    """The children of one `renalq up`. A context manager: leaving it, for any reason, stops all of them."""

    def __init__(
        self,
        logs: Path,
        folder: Path,
        lock: int,
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            logs: folder of the log files.
            folder: working folder of the children.
            lock: descriptor of the locked file.
            report: called with a line for the user.
        """
        self.token = secrets.token_hex(8)
        self._logs, self._folder, self._lock, self._report = logs, folder, lock, report
        self._children: dict[str, _Child] = {}
        self._stop_signal: signal.Signals | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._request_stop)
        self._reaper = orphan_reaper.start(self.token, self._lock)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_everything()
        orphan_reaper.stop(self._reaper)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = signal.Signals(number)  # handled at the next tick, never in the middle of a start

    def log(self, name: str) -> Path:
        """The log file of a service."""
        return self._logs / f"{name}.log"

    def pids(self) -> dict[str, int]:
        """Process ids by service."""
        return {name: child.process.pid for name, child in self._children.items()}

    def start(self, service: Service) -> subprocess.Popen[bytes]:
        """Start a service. Every later wait notices its death."""
        process = self._launch(service)
        known = self._children.get(service.name)
        self._children[service.name] = _Child(service, process, known.deaths if known else deque())
        return process

    def _launch(self, service: Service) -> subprocess.Popen[bytes]:
        environ = {**os.environ, **service.environ, **orphan_reaper.mark(self.token, service.stage)}
        return launch.start(service.command, self.log(service.name), environ, self._folder)

    def run(self, service: Service, seconds: float) -> None:
        """Run a command to its end. Raises `ServiceDiedError` if it fails or takes too long."""
        process = self._launch(service)
        try:
            self.wait_for(lambda: process.poll() is not None, f"{service.name} to end", seconds)
        finally:
            launch.stop(process, signal.SIGTERM, grace_seconds=3)
        if process.returncode != 0:
            raise ServiceDiedError(self._death_message(service.name, process.returncode))

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for a condition while watching all children. Raises `ServiceDiedError` after `seconds`."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise ServiceDiedError(f"Waited {seconds:.0f} s for {what} in vain; the logs are in {self._logs}")
            self.tick()

    def watch(self) -> None:
        """Watch until `StopRequestedError` or `ServiceDiedError` is raised."""
        while True:
            self.tick()

    def tick(self) -> None:
        """Check signals and children once, then sleep shortly."""
        if self._stop_signal is not None:
            raise StopRequestedError(self._stop_signal.name)
        for child in list(self._children.values()):
            if child.process.poll() is not None:
                self._handle_death(child)
        time.sleep(TICK_SECONDS)

    def _handle_death(self, child: _Child) -> None:
        name, now = child.service.name, time.monotonic()
        launch.signal_group(child.process.pid, signal.SIGKILL)  # what is left of its process group
        message = self._death_message(name, child.process.returncode)
        if not child.service.restarts:
            raise ServiceDiedError(message)
        child.deaths.append(now)
        while child.deaths[0] < now - RESTART_WINDOW_SECONDS:
            child.deaths.popleft()
        if len(child.deaths) > MAX_RESTARTS:
            raise ServiceDiedError(f"{message}; it did so {len(child.deaths)} times within a minute")
        self._report(f"{message}; starting it again")
        self.start(child.service)

    def _death_message(self, name: str, status: int) -> str:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        last = launch.last_line(self.log(name))
        return f"{name} {how} (log: {self.log(name)}{', which ends: ' + last[:200] if last else ''})"

    def _stop_everything(self) -> None:
        for stage in sorted(Stage, reverse=True):
            children = [child for child in self._children.values() if child.service.stage == stage]
            launch.stop_all(
                [(child.process, child.service.stop_signal, child.service.grace_seconds) for child in children]
            )
        # Processes in sessions of their own (a training's child process) are found by the mark.
        orphan_reaper.sweep(self.token, Stage.SERVERS, signal.SIGTERM, grace_seconds=2)
