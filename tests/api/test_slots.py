"""Waiting slots are shared: whoever has most gives one to a newcomer who has less."""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy.engine import Engine

from api.http.change_listener import ChangeListener, Holder, Subscription
from jobs.db import Sessions
from jobs.errors import TooManyWatchers
from jobs.queue.leases import Claim
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.tables import ModelVersion
from tests import builders
from tests.api.conftest import Door
from tests.processes import eventually

SLOTS = 6
Take = Callable[..., list[Subscription]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Few slots."""
    return settings.model_copy(update={"wait_slots": SLOTS})


@pytest.fixture
def listener(sessions: Sessions) -> Iterator[ChangeListener]:
    """A listener with few slots."""
    engine: Engine = sessions.kw["bind"]
    found = ChangeListener(engine, SLOTS)
    yield found
    found.close()


@pytest.fixture
def take(listener: ChangeListener) -> Iterator[Take]:
    """Takes slots, and keeps them for the length of the test."""
    with ExitStack() as stack:

        def run(holder: Holder, number: int) -> list[Subscription]:
            return [stack.enter_context(listener.subscribe(uuid.uuid4(), holder)) for _ in range(number)]

        yield run


def holder(tenant: str) -> Holder:
    return Holder(tenant, uuid.uuid4())


def left(subscriptions: list[Subscription]) -> int:
    return sum(not one.closed for one in subscriptions)


def test_a_newcomer_gets_its_share_of_slots_that_one_tenant_has_taken(listener: ChangeListener, take: Take) -> None:
    greedy, newcomer = holder("a"), holder("b")
    held = take(greedy, SLOTS)
    with pytest.raises(TooManyWatchers):
        take(greedy, 1)
    got = take(newcomer, SLOTS // 2)
    assert (left(held), left(got), listener.waiting) == (SLOTS // 2, SLOTS // 2, SLOTS)
    assert not any(one.closed for one in held[: SLOTS // 2]), "the latest ones went"
    for one in (greedy, newcomer):
        with pytest.raises(TooManyWatchers):
            take(one, 1)


def test_a_tenant_with_many_keys_has_no_more_than_its_share(take: Take) -> None:
    held = [one for _ in range(SLOTS) for one in take(holder("a"), 1)]
    got = take(holder("b"), SLOTS // 2)
    assert (left(held), left(got)) == (SLOTS // 2, SLOTS // 2)
    third = take(holder("c"), 2)
    assert (left(held), left(got), left(third)) == (2, 2, 2)


def test_the_keys_of_a_tenant_share_what_it_has(take: Take) -> None:
    greedy, other, elsewhere = holder("a"), holder("a"), holder("b")
    held, theirs = take(greedy, 4), take(elsewhere, 2)
    got = take(other, 2)
    assert (left(held), left(got), left(theirs)) == (2, 2, 2)
    with pytest.raises(TooManyWatchers):
        take(other, 1)


def test_a_slot_that_was_given_back_is_free_whoever_had_it(listener: ChangeListener, take: Take) -> None:
    job_id = uuid.uuid4()
    with listener.subscribe(job_id, holder("a")), listener.subscribe(job_id, holder("a")):
        take(holder("b"), SLOTS - 2)
    assert listener.waiting == SLOTS - 2
    take(holder("c"), 2)
    assert listener.waiting == SLOTS


# --- what a client sees that loses its slot ---


@pytest.fixture
def held(sessions: Sessions, champion: ModelVersion) -> Claim:
    """The unit of a prediction that runs."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT, scans=1, model_id=champion.id, model_version=1)
        return builders.claim(session, builders.units_of(session, job)[0])


def wait(client: FlaskClient, job_id: uuid.UUID) -> bool:
    """Waiting ends early with the job as it is, and does not say that it was waited for."""
    answer = client.get(f"/jobs/{job_id}", headers={"Prefer": "wait=30"})
    return answer.get_json()["state"] == "running" and "Preference-Applied" not in answer.headers


def events(client: FlaskClient, job_id: uuid.UUID) -> bool:
    """A stream of events ends, and can be continued."""
    with client.get(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as answer:
        text = answer.get_data(as_text=True)
    return "event: claimed" in text and "event: succeeded" not in text


def results(client: FlaskClient, job_id: uuid.UUID) -> bool:
    """A stream of results breaks off: nobody takes it for whole."""
    try:
        with client.get(f"/jobs/{job_id}/results", headers={"Accept": "application/x-ndjson"}) as answer:
            json.loads(answer.get_data(as_text=True))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("waits", [wait, events, results])
def test_a_client_that_loses_its_slot_is_answered_at_once(
    app: Flask, client: FlaskClient, door: Door, held: Claim, waits: Callable[[FlaskClient, uuid.UUID], bool]
) -> None:
    listener, found = app.extensions["renalq"].listener, []
    threads = [threading.Thread(target=lambda: found.append(waits(client, held.job_id))) for _ in range(SLOTS)]
    for thread in threads:
        thread.start()
    eventually(lambda: listener.waiting == SLOTS, 10)
    theirs = Holder("elsewhere", uuid.uuid4())
    with listener.subscribe(uuid.uuid4(), theirs), listener.subscribe(uuid.uuid4(), theirs):
        eventually(lambda: len(found) == 2, 5)
    assert found == [True, True]
    listener.close()
    for thread in threads:
        thread.join(10)
