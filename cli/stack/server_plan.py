"""What Postgres and Redis have in common: a plan of a server, which a supervisor or a test starts."""

from __future__ import annotations

import importlib.util
import random
import signal
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 30.0
"""How long a database server may take to answer, crash recovery included."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerPlan:
    """A server that can be started: its command, the URL at which it will answer, and the signal that stops it."""

    name: str
    command: list[str]
    url: str
    stop_signal: signal.Signals
    answers: Callable[[], bool]


PORTS = range(10_000, 32_768)
"""Ports to choose from: below those that the kernel gives to outgoing connections (Linux: 32768 to 60999).

A port that the kernel names as free may be given away again before the server listens on it. A random one out of
thousands hardly is."""


def free_port() -> int:
    """A TCP port on loopback that is free now.

    Raises:
        OSError: a hundred random ports were all taken.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise OSError(f"No free port on {LOOPBACK}: 100 of {PORTS.start} to {PORTS.stop - 1} are all taken.")


def wheel_folder(package: str) -> Path | None:
    """The folder of a package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
