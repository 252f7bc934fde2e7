"""A real dispatcher and a real predicting worker with the default settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bench.queues.databases import migrated
from cli.stack.embedded import embedded_postgres, embedded_redis
from jobs.db import session_factory
from jobs.settings import Settings
from tests.processes import Stack, stack


def start(folder: Path, everything: ExitStack, environ: Mapping[str, str] | None = None) -> Stack:
    """Start both on a Postgres and a Redis of their own, until `everything` is closed.

    Args:
        environ: what the worker has in its environment beside the settings.
    """
    postgres = migrated(everything.enter_context(embedded_postgres(folder / "postgres")), "bench")
    redis = everything.enter_context(embedded_redis(folder / "redis"))
    settings = Settings(home=folder, database_url=postgres, redis_url=redis, reuse_results=False)
    sessions = session_factory(postgres, pool_size=4, application="bench")
    processes = everything.enter_context(stack(settings, sessions, "dispatcher"))
    processes.start("predict", environ=environ)
    processes.alive()
    return processes
