"""Real Postgres and Redis for every test: the servers that the environment names, else those from the wheels."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from cli.stack.embedded import embedded_postgres, embedded_redis
from jobs.db import Sessions, make_engine, session_factory
from jobs.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run beside each other (`-n 2`): one file in one process, with its fixtures; and all that speak to the
    one whole stack, with its one training. Not by xdist's groups, which pytest 9.2 silently ignores (pytest-xdist
    #1386): each process then made the fixtures of each file, two stacks and two trainings among them."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "e2e" if "/e2e/" in file else file

    return ByFile(config, log)


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
def template(postgres: str) -> str:
    """A migrated database that each test clones: cloning takes a tenth of migrating."""
    name = f"template_{uuid.uuid4().hex[:8]}"
    _admin(postgres, f'CREATE DATABASE "{name}"')
    engine = make_engine(_named(postgres, name))
    with engine.connect() as connection:
        command.upgrade(alembic_config(connection), "head")
    engine.dispose()
    return name


@pytest.fixture
def database_url(postgres: str, template: str) -> Iterator[str]:
    """A database of the test's own, with all tables and no rows."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    _admin(postgres, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield _named(postgres, name)
    _admin(postgres, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    """Sessions on the test's database."""
    factory = session_factory(database_url, pool_size=20)
    yield factory
    factory.kw["bind"].dispose()


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a small stack: the test's database, short clocks."""
    return Settings(
        home=tmp_path,
        database_url=database_url,
        redis_url=redis_url,
        lease_seconds=2,
        beat_seconds=0.5,
        give_up_seconds=1.5,
        sweep_seconds=0.2,
        ring_again_seconds=1,
        process_seconds=0.5,
        retry_base_seconds=0.1,
    )


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


def alembic_config(connection: object = None) -> Config:
    """Alembic's configuration, on a given connection."""
    config = Config(ROOT / "alembic.ini")
    config.attributes["connection"] = connection
    return config


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def _admin(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
