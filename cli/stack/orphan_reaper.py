"""The last safeguard: a small process that ends what a killed `renalq up` has left.

`renalq up` holds the write end of a pipe to it. "done" on that pipe means a normal end. End-of-file without it means
that `renalq up` was killed: then every process with its mark is ended, first the services and then the servers. The
mark is an environment variable, so grandchildren in sessions of their own are found as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from enum import IntEnum

import psutil

from cli.stack.launch import STACK_MARK

SERVICES_SECONDS = 6.0
SERVERS_SECONDS = 6.0
KILL_SECONDS = 2.0
PR_SET_CHILD_SUBREAPER = 36


class Stage(IntEnum):
    """Stages of a stack, started in this order and stopped in reverse."""

    SERVERS = 1
    """Postgres and Redis: all others need them until the end."""
    SERVICES = 2
    """The API, the dispatcher, MLflow."""
    WORKERS = 3
    """Celery's workers, which hand their units back when they stop, and their monitor."""


def mark(token: str, stage: Stage) -> dict[str, str]:
    """The environment variable that marks a process as part of a stack."""
    return {STACK_MARK: f"{token}/{stage.value}"}


def marked(token: str, first: Stage = Stage.SERVERS) -> Iterator[psutil.Process]:
    """Living processes of the stack `token`, of stage `first` or later, without this one."""
    for process in psutil.process_iter():
        try:
            value = process.environ().get(STACK_MARK, "")
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
        name, _, stage = value.partition("/")
        if alive and name == token and int(stage) >= first and process.pid != os.getpid():
            yield process


def sweep(token: str, first: Stage, ask: signal.Signals, grace_seconds: float) -> int:
    """Ask all processes of stage `first` and later to end, then kill them. Returns how many there were."""
    found = list(marked(token, first))
    _send(found, ask)
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and (left := list(marked(token, first))):
        psutil.wait_procs(left, timeout=0.1)
    _send(marked(token, first), signal.SIGKILL)
    return len(found)


def _send(processes: Iterator[psutil.Process] | list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except (psutil.Error, OSError):
            continue


def adopt_orphans() -> None:
    """Become the parent of all descendants whose parent dies (prctl(2), Linux only).

    So `kill_orphans` finds what a dead service leaves, also what has no mark and a session of its own, as the
    backends of Postgres: as long as one of them lives, Postgres does not start again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans(started: Container[int]) -> None:
    """Kill the children of this process that it has not `started` itself."""
    left = [child for child in psutil.Process().children() if child.pid not in started]
    _send(left, signal.SIGKILL)
    psutil.wait_procs(left, KILL_SECONDS)


def collect_orphans(started: Container[int]) -> None:
    """Collect orphans that have ended by themselves; whoever `started` a process waits for that one."""
    with suppress(ChildProcessError):  # no children at all
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in started:
            os.waitpid(ended.si_pid, 0)


def start(token: str, keep_open: int) -> subprocess.Popen[bytes]:
    """Start a reaper. It inherits the lock file's descriptor: the lock is free only when all processes have ended."""
    command = [sys.executable, "-m", "cli.stack.orphan_reaper", token]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[keep_open],
        start_new_session=True,
    )


def stop(reaper: subprocess.Popen[bytes]) -> None:
    """Tell the reaper that `renalq up` ended normally."""
    reaper.communicate(b"done")


def main(token: str) -> None:
    """Wait for the end of `renalq up`; if it was killed, end its processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == b"done":
        return
    sweep(token, Stage.SERVICES, signal.SIGTERM, SERVICES_SECONDS)
    # SIGINT is Postgres' fast shutdown; SIGTERM would wait for every session to end by itself.
    sweep(token, Stage.SERVERS, signal.SIGINT, SERVERS_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
