"""Several dispatchers: one leads, the others stand by."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from psycopg2 import OperationalError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from jobs.db import Sessions
from jobs.queue import processes
from jobs.queue.processes import Heartbeat
from jobs.settings import Settings
from jobs.states import JobKind
from tests.builders import make_job, units_of
from tests.processes import eventually
from worker.dispatcher.leadership import planning_connection
from worker.dispatcher.loop import Dispatcher


class Messages:
    """What was published, and by which dispatcher."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, str]] = []

    def of(self, number: int):  # type: ignore[no-untyped-def]
        return lambda task, lane, unit_id: self.sent.append((number, unit_id))


@contextmanager
def running(dispatcher: Dispatcher) -> Iterator[None]:
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    try:
        yield
    finally:
        dispatcher.stop()
        thread.join(10)


def has_looked(sessions: Sessions) -> bool:
    """Whether a dispatcher has looked at the queue, and waits for notifications."""
    waits = text(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'renalq-dispatch'"
        " AND state = 'idle' AND query NOT LIKE 'LISTEN%' AND query NOT LIKE '%lock%'"
        " AND state_change < clock_timestamp() - interval '0.2 seconds'"
    )
    with sessions() as session:
        return session.execute(waits).first() is not None


def test_only_one_connection_leads(settings: Settings) -> None:
    with planning_connection(settings.database_url) as one:
        with planning_connection(settings.database_url) as other:
            assert (one.try_to_lead(), other.try_to_lead()) == (True, False)
        with planning_connection(settings.database_url) as other:
            assert not other.try_to_lead(), "the end of a connection that stood by changes nothing"
    with planning_connection(settings.database_url) as other:
        eventually(other.try_to_lead, 5)


def test_a_frozen_leader_is_replaced_and_cannot_plan_any_more(settings: Settings) -> None:
    with planning_connection(settings.database_url) as frozen, planning_connection(settings.database_url) as other:
        assert frozen.try_to_lead()
        assert not other.end_frozen_leader(30), "it has just asked something"
        time.sleep(0.2)
        assert other.end_frozen_leader(0.1)
        eventually(other.try_to_lead, 5)
        with pytest.raises((DBAPIError, OperationalError)), frozen.begin() as session:
            make_job(session)


def test_ten_dispatchers_send_no_more_messages_than_there_are_idle_workers(
    settings: Settings, sessions: Sessions
) -> None:
    messages = Messages()
    settings = settings.model_copy(update={"process_seconds": 60, "ring_again_seconds": 60})
    with sessions.begin() as session:
        for number in range(4):
            processes.register(session, Heartbeat(f"w{number}@here/a", processes.WORKER, ["urgent", "batch"]))
    with ExitStack() as all_of_them:
        for number in range(10):
            all_of_them.enter_context(running(Dispatcher(settings, sessions, messages.of(number))))
        with sessions.begin() as session:
            for number in range(40):
                make_job(session, JobKind.PREDICT, scans=1, tenant_id=f"t{number % 20}")
        eventually(lambda: len(messages.sent) >= 4, 10)
        time.sleep(3 * settings.sweep_seconds)
    assert len(messages.sent) == len({unit for _, unit in messages.sent}) == 4, "as many as idle workers"
    assert len({number for number, _ in messages.sent}) == 1, "one of them leads"


def test_a_unit_for_an_idle_worker_is_dispatched_before_the_next_look_and_only_one(
    settings: Settings, sessions: Sessions
) -> None:
    messages = Messages()
    settings = settings.model_copy(update={"process_seconds": 60, "sweep_seconds": 60, "ring_again_seconds": 60})
    with sessions.begin() as session:
        processes.register(session, Heartbeat("w@here/a", processes.WORKER, ["urgent", "batch"]))

    def submit(lane: JobKind) -> str:
        with sessions.begin() as session:
            return str(units_of(session, make_job(session, lane, scans=1))[0].id)

    with running(Dispatcher(settings, sessions, messages.of(0))), sessions.begin() as blocking:
        eventually(lambda: has_looked(sessions), 10)
        blocking.execute(text("LOCK TABLE processes IN ACCESS EXCLUSIVE MODE"))  # each look reads it
        first = submit(JobKind.PREDICT)
        eventually(lambda: messages.sent, 5)
        submit(JobKind.PREDICT)
        blocking.commit()
        time.sleep(0.5)
    assert messages.sent == [(0, first)]


def test_another_dispatcher_leads_when_the_leader_ends(settings: Settings, sessions: Sessions) -> None:
    messages = Messages()
    dispatchers = [Dispatcher(settings, sessions, messages.of(number)) for number in range(2)]
    with running(dispatchers[0]), running(dispatchers[1]):
        for kind in (JobKind.PREDICT, JobKind.TRAIN):  # of two lanes: without a worker each gets one message
            with sessions.begin() as session:
                make_job(session, kind, scans=1)
            sent = len(messages.sent)
            eventually(lambda sent=sent: len(messages.sent) > sent, 10)  # type: ignore[misc]
            dispatchers[messages.sent[-1][0]].stop()
    assert {number for number, _ in messages.sent} == {0, 1}
