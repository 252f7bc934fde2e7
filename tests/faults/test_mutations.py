"""Three guards, each taken away once in the SQL that goes out: the same story then ends in a broken database.

What the cases promise would otherwise rest on tests that might pass for other reasons.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.errors import LeaseLost
from jobs.queue import leases, lifecycle, reaping
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import RetryPolicy
from jobs.states import JobKind, JobState
from jobs.tables import Job
from tests.builders import claim, make_job, outcomes_of, units_of
from tests.jobs.checker import faults
from tests.processes import count, eventually

pytestmark = pytest.mark.faults

FENCE = r"\b(units\.)?(fence|worker) = (%\(\w+\)s|\$\d)(?! *,)(?! WHERE)"
EXPIRY = r"units\.lease_expires_at < clock_timestamp\(\)"


@contextmanager
def without(sessions: Sessions, guard: str) -> Iterator[None]:
    """Every UPDATE of a unit goes out without this condition, prepared or not."""
    engine, taken = sessions.kw["bind"], []

    def mutate(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        if "UPDATE units SET" in statement:
            statement, times = re.subn(guard, "true", statement)
            taken.append(times)
        return statement, parameters

    event.listen(engine, "before_cursor_execute", mutate, retval=True)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", mutate)
    assert sum(taken), "the guard was not found: it is written otherwise now"


# --- the fence (cases 9 and 11) ---


def test_with_the_fence_an_old_attempt_can_write_nothing(sessions: Sessions) -> None:
    assert _three_attempts(sessions) == []


def test_without_the_fence_the_trigger_behind_it_refuses_a_second_result(sessions: Sessions) -> None:
    with without(sessions, FENCE), pytest.raises(IntegrityError, match="has ended as succeeded"):
        _three_attempts(sessions)


def test_without_both_scans_are_counted_twice(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.execute(text("DROP TRIGGER scan_results_end_once ON scan_results"))
    with without(sessions, FENCE):
        assert [fault.partition(":")[0] for fault in _three_attempts(sessions)] == ["counters differ from the rows"]


def _three_attempts(sessions: Sessions) -> list[str]:
    """Two workers that were thought dead write what they have, each under the hands of the next; the checker's word."""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        unit = units_of(session, job)[0]
    held = []
    for worker in ("first", "second"):
        with sessions.begin() as session:
            held.append(claim(session, unit, worker))
            _let_the_lease_run_out(session)
            assert reaping.reap(session, retry=RetryPolicy(), stall=900) == 1
    with sessions.begin() as session:
        claim(session, unit, "third")
        outcomes = outcomes_of(session, held[0])
    _write(sessions, lambda session: lifecycle.requeue(session, held[0], "DRAINED", outcomes[:5]))
    with sessions.begin() as session:
        leases.claim(session, unit.id, "fourth", 45)
    _write(sessions, lambda session: lifecycle.succeed(session, held[1], outcomes=outcomes))
    with sessions() as session:
        return faults(session)


def _write(sessions: Sessions, verb: Callable[[Session], object]) -> None:
    with suppress(LeaseLost), sessions.begin() as session:
        verb(session)


# --- the expiry, asked again (case 10) ---


def test_the_reaper_asks_again_before_it_takes_a_unit(sessions: Sessions) -> None:
    assert _beaten_in_between(sessions) == []


def test_without_asking_again_the_reaper_ends_a_living_workers_unit(sessions: Sessions) -> None:
    with without(sessions, EXPIRY):
        assert _beaten_in_between(sessions) == ["the job has failed", "its living worker has lost it"]


def _beaten_in_between(sessions: Sessions) -> list[str]:
    """The reaper reads a unit that is late; its worker beats; the reaper writes; the worker ends it. What is wrong?"""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=4)
        held = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
    reaper = threading.Thread(target=_reap, args=(sessions,))
    with sessions.begin() as session:
        session.execute(text("SELECT id FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": job.id})
        reaper.start()
        eventually(lambda: count(sessions, WAITING_FOR_A_LOCK), 10)  # it has read, and waits for the job's row
        assert leases.beat(session, held, 45).held
    reaper.join(10)
    lost = _end(sessions, held)
    with sessions() as session:
        state = session.get_one(Job, job.id).state
        found = faults(session)
    return [*found, *([] if state == JobState.SUCCEEDED else [f"the job has {state}"]), *lost]


WAITING_FOR_A_LOCK = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def _reap(sessions: Sessions) -> None:
    with sessions.begin() as session:
        reaping.reap(session, retry=RetryPolicy(max_failures=1), stall=900)


def _end(sessions: Sessions, held: Claim) -> list[str]:
    try:
        with sessions.begin() as session:
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    except LeaseLost:
        return ["its living worker has lost it"]
    return []


# --- the trigger on ended jobs ---


def test_the_trigger_refuses_a_second_end(sessions: Sessions) -> None:
    with pytest.raises(IntegrityError, match="has ended as"):
        _second_end(sessions)
    with sessions() as session:
        assert faults(session) == []


def test_without_the_trigger_an_unguarded_update_gives_a_job_two_ends(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.execute(text("ALTER TABLE jobs DISABLE TRIGGER jobs_move_legally"))
    _second_end(sessions)
    with sessions() as session:
        assert "a terminal event names another state than the job's" in [f.partition(":")[0] for f in faults(session)]


def _second_end(sessions: Sessions) -> None:
    """What a verb that forgot its guard would do to an ended job."""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=4)
    with sessions.begin() as session:
        session.execute(text("UPDATE jobs SET state = 'failed' WHERE id = :id"), {"id": job.id})


def _let_the_lease_run_out(session: Session) -> None:
    session.execute(text("UPDATE units SET lease_expires_at = clock_timestamp() - interval '1 second' WHERE fence > 0"
                         " AND state = 'running'"))  # fmt: skip
