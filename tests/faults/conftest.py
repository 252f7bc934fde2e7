"""A stack of the test's own with short clocks, and what is to go wrong in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.db import Sessions, session_factory
from jobs.settings import Settings
from tests.databases import Databases
from tests.faults.sabotage import Sabotage
from tests.processes import Stack, stack

SHORT = {
    "cancel_grace_seconds": 0.5,
    "watch_seconds": 0.1,
    "newcomer_seconds": 0.5,
    "checkpoint_seconds": 0,
    "reuse_results": False,  # the cases count who looked at which scan, and their batches share scans
}


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A database of the case's own: no process that it killed or lost can reach another case."""
    with databases.clone() as url:
        yield url


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    """Sessions on the case's database."""
    factory = session_factory(database_url, pool_size=20)
    yield factory
    factory.kw["bind"].dispose()


@pytest.fixture
def fast(settings: Settings) -> Settings:
    """Short clocks: beat 0.5 s, lease 2 s."""
    return settings.model_copy(update=SHORT)


@pytest.fixture
def plan(tmp_path: Path) -> Sabotage:
    """What goes wrong in the processes that are started with it."""
    return Sabotage(tmp_path)


@pytest.fixture
def processes(fast: Settings, sessions: Sessions) -> Iterator[Stack]:
    """No process yet; none outlives the test."""
    with stack(fast, sessions) as empty:
        yield empty
