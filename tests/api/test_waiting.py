"""Waiting for a job: whoever waits reads it at once, then four times a second at most, and to the end."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import update

from api.http import change_listener
from api.http.change_listener import Holder
from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.queue.leases import Claim
from jobs.results import queries
from jobs.states import JobKind
from jobs.tables import Job, ModelVersion
from tests import builders

CHANGES = 100
Follow = Callable[[FlaskClient, uuid.UUID], bool]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a job was read."""
    found: list[float] = []
    read = queries.job

    def counted(*args: object) -> object:
        found.append(time.monotonic())
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(queries, "job", counted)
    return found


@pytest.fixture
def held(sessions: Sessions, champion: ModelVersion) -> Claim:
    """The unit of a prediction that runs."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT, scans=1, model_id=champion.id, model_version=1)
        return builders.claim(session, builders.units_of(session, job)[0])


def events(client: FlaskClient, job_id: uuid.UUID) -> bool:
    with client.get(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}, buffered=True) as answer:
        return "event: succeeded" in answer.get_data(as_text=True)


def results(client: FlaskClient, job_id: uuid.UUID) -> bool:
    with client.get(f"/jobs/{job_id}/results", headers={"Accept": "application/x-ndjson"}, buffered=True) as answer:
        return json.loads(answer.get_data(as_text=True).strip())["state"] == "succeeded"


def wait(client: FlaskClient, job_id: uuid.UUID) -> bool:
    return client.get(f"/jobs/{job_id}", headers={"Prefer": "wait=30"}).get_json()["state"] == "succeeded"


@contextmanager
def changing(sessions: Sessions, held: Claim) -> Iterator[None]:
    """Change the job many times, in a thread, and end it."""

    def run() -> None:
        for number in range(CHANGES):
            with sessions.begin() as session:
                session.execute(update(Job).where(Job.id == held.job_id).values(progress=number / CHANGES))
            time.sleep(0.01)
        with sessions.begin() as session:
            lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("follow", [events, results, wait])
def test_a_job_that_changes_often_is_read_four_times_a_second(
    client: FlaskClient, sessions: Sessions, held: Claim, reads: list[float], follow: Follow
) -> None:
    with changing(sessions, held):
        assert follow(client, held.job_id), "the last change is read"
    seconds = reads[-1] - reads[0]
    at_once = 2 + change_listener.READ_AT_ONCE  # the request itself, what it begins with, and the first changes
    assert len(reads) <= at_once + seconds / change_listener.READ_SECONDS + 1 < CHANGES


def test_the_first_changes_after_a_rest_are_told_at_once(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_listener, "READ_SECONDS", 60)
    with app.extensions["renalq"].listener.subscribe(
        uuid.uuid4(), Holder(builders.TENANT, uuid.uuid4())
    ) as subscription:
        started = time.monotonic()
        for _ in range(change_listener.READ_AT_ONCE):
            subscription.event.set()
            assert subscription.wait(100)
        assert time.monotonic() - started < 60
