"""Start services in order, watch them, start dead ones again, and stop all in the reverse order.

Written here because existing process managers leave their children behind when they are killed, or stop all at once:
workers must hand their units back before Postgres stops (docs/decisions/0007). Single-threaded on purpose (see
`cli.stack.launch` on PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from cli.stack import launch, orphan_reaper
from cli.stack.log_writer import LogWriter
from cli.stack.orphan_reaper import Stage
from jobs.stack_state import ServiceState, ServiceStatus

TICK_SECONDS = 0.1
ANSWER_SECONDS = 0.5
"""Interval of asking a service that has just started whether it answers."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
"""Waits before a dead service is started again: doubled from death to death."""
STABLE_SECONDS = 60.0
"""A service that has run for so long dies for the first time again."""
MAX_RESTARTS = 5
"""An essential service that dies once more than this in succession ends the stack."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequestedError(Exception):
    """A signal asked the whole stack to stop."""


class ServiceDiedError(Exception):
    """A service that is needed does not stay alive; the message names it and its log."""


@dataclass(frozen=True)
class Service:
    """One long-running process of the stack."""

    name: str
    command: list[str]
    stage: Stage
    environ: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0
    essential: bool = True
    """Jobs need it. Any dead service is started again, but one that is not essential never ends the stack."""
    answers: Callable[[], bool] | None = None
    """Asked, without long waits, until it is true: then the service runs. None: it runs from its start on."""


@dataclass
class _Child:
    service: Service
    process: subprocess.Popen[bytes]
    status: ServiceStatus
    began: float
    deaths: int = 0
    """In succession."""
    due: float = 0.0
    """When it is asked whether it answers, or started again; on the monotonic clock."""

    def become(self, state: ServiceState, **changes: object) -> None:
        now = dt.datetime.now(dt.UTC)
        self.status = self.status.model_copy(update={"state": state, "since": now, **changes})


class Supervisor:
    """The children of one `renalq up`. A context manager: leaving it, for any reason, stops all of them."""

    def __init__(self, logs: Path, folder: Path, lock: int, log_bytes: int) -> None:
        """
        Args:
            logs: folder of the log files.
            folder: working folder of the children.
            lock: descriptor of the locked file.
            log_bytes: size at which a log file is rotated (bytes).
        """
        self.token = secrets.token_hex(8)
        self.on_event: Callable[[str], None] = print
        """Called with a line for the user: a service died, or answers again."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `statuses()` has changed."""
        self._logs, self._folder, self._lock, self._log_bytes = logs, folder, lock, log_bytes
        self._children: dict[str, _Child] = {}
        self._command: subprocess.Popen[bytes] | None = None
        self._told: list[ServiceStatus] = []
        self._stop_signal: signal.Signals | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._request_stop)
        orphan_reaper.adopt_orphans()
        self._reaper = orphan_reaper.start(self.token, self._lock)
        self._log_writer = LogWriter(self._logs, self._lock, self._log_bytes)
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

    def statuses(self) -> list[ServiceStatus]:
        """What each service does now, in the order of their first start."""
        return [child.status for child in self._children.values()]

    def state(self, name: str) -> ServiceState:
        """What one service does now."""
        return self._children[name].status.state

    def start(self, service: Service) -> None:
        """Start a service. Every later wait notices its death."""
        process, now = self._launch(service), dt.datetime.now(dt.UTC)
        status = ServiceStatus(
            name=service.name, state=_first_state(service), since=now, essential=service.essential, pid=process.pid
        )
        self._children[service.name] = _Child(service, process, status, time.monotonic())

    def _start_again(self, child: _Child) -> None:
        child.began = time.monotonic()
        try:
            child.process = self._launch(child.service)
        except OSError as error:  # no memory or no process left, or its program is being replaced
            return self._plan_restart(child, f"cannot be started ({error.strerror})")
        child.become(_first_state(child.service), pid=child.process.pid, restarts=child.status.restarts + 1)

    def _launch(self, service: Service) -> subprocess.Popen[bytes]:
        environ = {**os.environ, **service.environ, **orphan_reaper.mark(self.token, service.stage)}
        return launch.spawn(service.command, self._log_writer.pipe(service.name), environ, self._folder)

    def run(self, service: Service, seconds: float) -> None:
        """Run a command to its end. Raises `ServiceDiedError` if it fails or takes too long."""
        self._command = process = self._launch(service)
        try:
            self.wait_for(lambda: process.poll() is not None, f"{service.name} to end", seconds)
        finally:
            launch.stop(process, signal.SIGTERM, grace_seconds=3)
            self._command = None
        if process.returncode != 0:
            raise ServiceDiedError(f"{service.name} {_how(process.returncode)} {self._where(service.name)}")

    def wait_for(self, happened: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for a condition while watching all children. Raises `ServiceDiedError` after `seconds`."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise ServiceDiedError(f"Waited {seconds:.0f} s for {what} in vain; the logs are in {self._logs}")
            self.tick()

    def wait_until_running(self, name: str, seconds: float) -> None:
        """`wait_for` a service to answer."""
        self.wait_for(lambda: self.state(name) is ServiceState.RUNNING, f"{name} to answer", seconds)

    def watch(self) -> None:
        """Watch until `StopRequestedError` or `ServiceDiedError` is raised."""
        while True:
            self.tick()

    def tick(self) -> None:
        """Check signals and children once, then sleep shortly."""
        if self._stop_signal is not None:
            raise StopRequestedError(self._stop_signal.name)
        self._ensure_guards()
        orphan_reaper.collect_orphans(self._started())
        for child in self._children.values():
            self._advance(child)
        if self.statuses() != self._told:
            self._told = self.statuses()
            self.on_change()
        time.sleep(TICK_SECONDS)

    def _ensure_guards(self) -> None:
        with suppress(OSError):  # no memory or no process left: at the next tick
            self._log_writer.ensure()
            if self._reaper.poll() is not None:
                self._reaper = orphan_reaper.start(self.token, self._lock)

    def _started(self) -> set[int]:
        """Process ids of all children that were started here, dead ones included."""
        command = [self._command.pid] if self._command else []
        return {self._reaper.pid, self._log_writer.pid, *command, *self.pids().values()}

    def _advance(self, child: _Child) -> None:
        state, is_due = child.status.state, time.monotonic() >= child.due
        if state is ServiceState.RESTARTING:
            if is_due:
                self._start_again(child)
        elif child.process.poll() is not None:
            self._handle_death(child)
        elif state is ServiceState.STARTING and is_due:
            self._ask(child)

    def _ask(self, child: _Child) -> None:
        child.due = time.monotonic() + ANSWER_SECONDS
        if child.service.answers is not None and child.service.answers():
            child.become(ServiceState.RUNNING)
            if child.status.restarts:
                self.on_event(f"{child.service.name} answers again")

    def _handle_death(self, child: _Child) -> None:
        launch.signal_group(child.process.pid, signal.SIGKILL)  # what is left of its process group
        orphan_reaper.kill_orphans(self._started())
        self._plan_restart(child, _how(child.process.returncode))

    def _plan_restart(self, child: _Child, how: str) -> None:
        name, now = child.service.name, time.monotonic()
        message = f"{name} {how} {self._where(name)}"
        child.deaths = 1 if now - child.began > STABLE_SECONDS else child.deaths + 1
        if child.service.essential and child.deaths > MAX_RESTARTS:
            raise ServiceDiedError(f"{message}; it died {child.deaths} times in succession")
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(child.deaths - 1, 10))
        child.due = now + wait
        child.become(ServiceState.RESTARTING, last_death=how)
        self.on_event(f"{message}; starting it again in {wait:g} s")

    def _where(self, name: str) -> str:
        self._log_writer.flush(name)
        last = launch.last_line(self.log(name))
        return f"(log: {self.log(name)}{', which ends: ' + last[:200] if last else ''})"

    def _stop_everything(self) -> None:
        for stage in sorted(Stage, reverse=True):
            children = [child for child in self._children.values() if child.service.stage == stage]
            launch.stop_all(
                (child.process, child.service.stop_signal, child.service.grace_seconds)
                for child in children
                if child.status.state is not ServiceState.RESTARTING  # its id may be another's by now
            )
        # Processes in sessions of their own (a training's child process) are found by the mark.
        orphan_reaper.sweep(self.token, Stage.SERVERS, signal.SIGTERM, grace_seconds=2)
        orphan_reaper.kill_orphans({self._reaper.pid, self._log_writer.pid})
        self._log_writer.close()


def _first_state(service: Service) -> ServiceState:
    return ServiceState.RUNNING if service.answers is None else ServiceState.STARTING


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"
