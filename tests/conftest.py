"""Real Postgres and Redis for every test: the servers that the environment names, else those from the wheels."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from cli.stack.embedded import embedded_postgres, embedded_redis
from jobs.db import Sessions
from jobs.settings import Settings
from tests.databases import Database, Databases
from tests.depth import depth
from tests.processes import small_settings
from tests.whole_stack import RunningStack, running_stack

if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Beside other processes, small products take up to seven times as long on two threads as on one. For torch, here (it is
# not imported yet) and in all processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# For tests that give no number of examples. In CI they are the same ones each time, by a profile of hypothesis.
hypothesis.settings.register_profile("renalq", hypothesis.settings(), max_examples=depth(30, 500), deadline=None)
hypothesis.settings.load_profile("renalq")

SHARED = {
    "whole stack": ("tests/e2e/", "tests/cli/test_devstack.py", "tests/cli/test_local_users.py"),
    "MLflow": ("tests/worker/test_live_runs.py", "tests/worker/test_registry_sync.py", "tests/worker/test_backfill.py"),
    "first page": ("tests/browser/",),
}
"""Files that share something that takes long to start: one process runs them all."""
LONGEST = (
    "tests/e2e/", "tests/cli/test_devstack.py", "tests/worker/test_processes.py", "tests/faults/test_dependencies.py",
    "tests/faults/test_crashes.py", "tests/browser/", "tests/ml/test_stages.py", "tests/ml/test_ddp.py",
    "tests/worker/test_live_runs.py", "tests/ml/test_ood.py", "tests/ml/test_checkpoints.py",
)  # fmt: skip
"""Files that take longest, longest first: where tests run beside each other, the end waits for the last file."""


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody calls it
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run beside each other (`-n 2`): one file in one process, with its fixtures. Not by xdist's groups,
    which pytest 9.2 silently ignores (pytest-xdist #1386): each process then made the fixtures of each file."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((shared for shared, files in SHARED.items() if any(name in file for name in files)), file)

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run beside each other: the longest files first, then as they were collected."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Postgres server."""
    given = os.environ.get("RENALQ_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with embedded_postgres(tmp_path_factory.mktemp("postgres"), fsync=False) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server."""
    given = os.environ.get("RENALQ_TEST_REDIS_URL")
    if given:
        yield given
        return
    with embedded_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def databases(postgres: str) -> Iterator[Databases]:
    """Migrated databases for one test after another."""
    pool = Databases(postgres)
    yield pool
    pool.close()


@pytest.fixture
def database(databases: Databases) -> Iterator[Database]:
    """A database with all tables and no rows. Others have used it, and will."""
    with databases.borrow() as borrowed:
        yield borrowed


@pytest.fixture
def database_url(database: Database) -> str:
    """The URL of the test's database."""
    return database.url


@pytest.fixture
def sessions(database: Database) -> Sessions:
    """Sessions on the test's database."""
    return database.sessions(pool_size=20)


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a small stack: the test's database, short clocks."""
    return small_settings(tmp_path, database_url, redis_url)


@pytest.fixture(scope="session")
def whole_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """`renalq up` with all its parts, for all tests that leave it running."""
    many_units = {"RENALQ_CHUNK_SECONDS": "0.5", "RENALQ_CHUNK_SCANS": "16"}  # of a small batch
    with running_stack(tmp_path_factory.mktemp("whole") / "home", **depth(many_units, {})) as stack:
        yield stack


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Chromium. One for all folders: Playwright cannot be started twice in a process."""
    from playwright.sync_api import sync_playwright  # most tests need none

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
