"""Postgres and Redis for the duration of a `with` block, for tests and benchmarks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.stack import launch
from cli.stack.launch import CannotStartError
from cli.stack.postgres import create_database, postgres_environ, prepare_postgres
from cli.stack.redis_server import prepare_redis
from cli.stack.server_plan import START_SECONDS, ServerPlan


@contextmanager
def embedded_postgres(folder: Path, fsync: bool = True) -> Iterator[str]:
    """A Postgres in `folder` for the duration of the block; yields the URL of its database `renalq`.

    It ends with the block, with Ctrl-C, and when this process is killed. Enter it from the main thread.
    """
    plan = prepare_postgres(folder, fsync)
    with _running(plan, folder / "logs" / "postgres.log"):
        create_database(plan.url, "renalq")
        yield plan.url


@contextmanager
def embedded_redis(folder: Path) -> Iterator[str]:
    """A Redis in `folder` for the duration of the block; yields its URL. As `embedded_postgres`."""
    plan = prepare_redis(folder)
    with _running(plan, folder / "logs" / "redis.log"):
        yield plan.url


@contextmanager
def _running(plan: ServerPlan, log: Path) -> Iterator[None]:
    child = launch.start(plan.command, log, postgres_environ())
    try:
        wait_until_ready(plan, child, log)
        yield
    finally:
        launch.stop(child, plan.stop_signal, grace_seconds=10)


def wait_until_ready(plan: ServerPlan, child: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers.

    Raises:
        CannotStartError: it ended before, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while not plan.answers():
        if child.poll() is not None:
            raise CannotStartError(f"{plan.name} ended at once: {launch.last_line(log)} (log: {log})")
        if time.monotonic() > deadline:
            raise CannotStartError(f"{plan.name} did not answer in {START_SECONDS:.0f} s (log: {log})")
        time.sleep(0.05)
