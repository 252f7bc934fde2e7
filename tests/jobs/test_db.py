"""What the queue takes from `jobs.db`: LISTEN in a busy process, commits that do not wait for the disk, the clock."""

import os
import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from jobs.db import Sessions, StandingSession, listening
from jobs.events.job_events import UNITS_CHANNEL, wake_dispatcher
from tests.processes import ROOT

NEEDED = 1100
"""Open files of a process with many clients; `select.select` fails for descriptors above 1023."""


@pytest.fixture
def many_files() -> Iterator[None]:
    """All descriptors below `NEEDED` are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * NEEDED:
        pytest.skip(f"the system allows {hard} open files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * NEEDED), hard))
    opened = []
    while not opened or opened[-1] < NEEDED:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_process_with_many_open_files_is_notified(sessions: Sessions) -> None:
    with listening(sessions.kw["bind"], UNITS_CHANNEL) as notifications:
        assert notifications.wait(0.01) == []
        with sessions.begin() as session:
            wake_dispatcher(session, "x")
        assert notifications.wait(10) == ["x"]


def test_statements_that_commit_without_waiting_are_planned_for_large_tables(database_url: str) -> None:
    standing = StandingSession(database_url, "test")
    settings = "synchronous_commit", "enable_seqscan", "plan_cache_mode"
    with standing.begin() as session:
        values = [session.scalar(text("SELECT current_setting(:name)"), {"name": name}) for name in settings]
        assert values == ["off", "off", "force_generic_plan"]
        session.execute(text("CREATE TABLE committed_at_once ()"))
        session.rollback()
        session.execute(text("DROP TABLE committed_at_once"))
    standing.close()


def test_a_standing_session_keeps_its_connection_until_that_is_lost(database_url: str, sessions: Sessions) -> None:
    standing = StandingSession(database_url, "test")
    backend = text("SELECT pg_backend_pid()")

    def used() -> int | None:
        with standing.begin() as session:
            return session.scalar(backend)

    with ThreadPoolExecutor(4) as threads:
        (pid,) = {future.result() for future in [threads.submit(used) for _ in range(16)]}
    with sessions.begin() as session:
        session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    with pytest.raises(OperationalError):
        used()
    assert used() not in (None, pid)
    standing.close()


def test_no_time_of_a_row_comes_from_the_clock_of_a_process() -> None:
    own_clock = re.compile(r"datetime\.now|utcnow|date\.today")
    files = [path for package in ("jobs", "worker") for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in files if own_clock.search(path.read_text())] == []
