"""What the servers of Postgres and Redis have in common: a plan to be run by a supervisor or a test."""

from __future__ import annotations

import importlib.util
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 30.0
"""How long a database server may take to answer: crash recovery after a kill -9 included."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerPlan:
    """A server that is ready to be started: what to run, where it will answer, how it is asked to stop."""

    name: str
    command: list[str]
    url: str
    stop_signal: signal.Signals
    answers: Callable[[], bool]


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with closing(socket.socket()) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wheel_folder(package: str) -> Path | None:
    """Where a package lies, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
