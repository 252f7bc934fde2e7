"""`job.progress`: one delivery for each job and webhook, renewed as the job goes on, however slow the receiver is."""

import datetime as dt
from collections.abc import Sequence

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.events import deliveries, webhooks
from jobs.events.deliveries import Attempt
from jobs.events.progress import emit_progress
from jobs.events.webhooks import EventType, Receiver
from jobs.queue import lifecycle
from jobs.queue.leases import Claim
from jobs.states import JobKind
from jobs.tables import Delivery, Job
from tests import builders
from tests.builders import TENANT

URL = "https://ris.example/hook"
PROGRESS = [EventType.JOB_PROGRESS]


def running(session: Session, kind: JobKind = JobKind.TRAIN, progress: float = 0.2, **new: object) -> tuple[Job, Claim]:
    job = builders.make_job(session, kind, scans=4 if kind != JobKind.TRAIN else 0, chunk=2, **new)  # type: ignore[arg-type]
    held = builders.claim(session, builders.units_of(session, job)[0])
    if kind == JobKind.TRAIN:
        lifecycle.report(session, held, progress=progress)
    return job, held


def told(session: Session) -> list[float]:
    session.expire_all()
    return [row.data["progress"] for row in session.scalars(select(Delivery).order_by(Delivery.id))]


def deliver(session: Session, status: int = 204) -> None:
    session.commit()  # a delivery is due in later transactions
    due = deliveries.claim(session, 60, [], [])
    assert due is not None
    deliveries.record_attempt(session, due, Attempt(status, None if status < 300 else "no"), ())


def later(session: Session, seconds: float = 6) -> None:
    past = func.clock_timestamp() - dt.timedelta(seconds=seconds)
    session.execute(update(Delivery).values(created_at=past))


@pytest.fixture
def session(sessions: Sessions) -> Sequence[Session]:
    with sessions() as session:
        yield session  # type: ignore[misc]


def test_it_comes_once_in_five_seconds_and_only_when_the_job_has_gone_on(session: Session) -> None:
    webhooks.create(session, TENANT, URL, PROGRESS)
    _, held = running(session)
    emit_progress(session)
    deliver(session)
    lifecycle.report(session, held, progress=0.4)
    emit_progress(session)
    assert told(session) == [0.2], "not yet again"
    later(session)
    emit_progress(session)
    assert told(session) == [0.4]
    deliver(session)
    later(session)
    emit_progress(session)
    session.commit()
    assert deliveries.claim(session, 60, [], []) is None, "it stands still"


def test_each_renewal_is_another_event(session: Session) -> None:
    webhooks.create(session, TENANT, URL, PROGRESS)
    _, held = running(session)
    ids = set()
    for progress in (0.3, 0.4, 0.5):
        lifecycle.report(session, held, progress=progress)
        emit_progress(session)
        ids.add(session.scalar(select(Delivery.event_id)))
        deliver(session)
        later(session)
    assert len(ids) == 3


@pytest.mark.parametrize("status", [204, 500])
def test_nothing_piles_up_while_a_receiver_does_not_answer(session: Session, status: int) -> None:
    webhooks.create(session, TENANT, URL, PROGRESS)
    _, held = running(session)
    for progress in (0.3, 0.4, 0.5):
        lifecycle.report(session, held, progress=progress)
        emit_progress(session)
        later(session)
    assert told(session) == [0.3], "it is still to be sent, and what is sent is read then"
    deliver(session, status)
    emit_progress(session)
    assert told(session) == [0.5]


def test_a_batch_tells_how_many_scans_are_done_and_a_single_scan_nothing(session: Session) -> None:
    webhooks.create(session, TENANT, URL, PROGRESS)
    _, held = running(session, JobKind.PREDICT_BATCH)
    running(session, JobKind.PREDICT)
    emit_progress(session)
    assert told(session) == []
    lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    emit_progress(session)
    assert told(session) == [0.5]


def test_only_who_subscribes_hears_of_it(session: Session) -> None:
    webhooks.create(session, TENANT, URL, [EventType.JOB_SUCCEEDED])
    webhooks.create(session, "elsewhere", URL, PROGRESS)
    webhooks.create(session, TENANT, URL, PROGRESS, [JobKind.PREDICT_BATCH])
    running(session)
    running(session, receiver=Receiver(URL))
    own, _ = running(session, receiver=Receiver(URL, events=PROGRESS))
    emit_progress(session)
    assert session.scalars(select(Delivery.job_id)).all() == [own.id]
