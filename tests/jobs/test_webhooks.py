"""Deliveries of events: written in the event's transaction, one per subscribed webhook."""

import datetime as dt
import threading
import uuid
from collections.abc import Collection
from dataclasses import replace

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.errors import TooManyWebhooks, WebhookNotFound
from jobs.events import deliveries, webhooks
from jobs.events.deliveries import Attempt, DueDelivery
from jobs.events.webhooks import EventType, Receiver
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.paging import Page
from jobs.queue import lifecycle, submission
from jobs.states import TERMINAL, JobKind, JobState
from jobs.tables import Delivery, Job, Webhook, new_id
from tests import builders
from tests.builders import TENANT
from tests.plans import most_rows

URL = "https://ris.example/hook"
RETRIES = (5.0, 300.0)


def make_webhook(session: Session, *events: str, tenant_id: str = TENANT) -> Webhook:
    return webhooks.create(session, tenant_id, URL, events or list(EventType))


def delivered(session: Session) -> list[tuple[str, str, dict]]:
    """Type, event's id and data of each delivery, oldest first."""
    session.expire_all()
    rows = session.scalars(select(Delivery).order_by(Delivery.id))
    return [(row.type, row.event_id, row.data) for row in rows]


def claimed(session: Session, hold: float = 60) -> DueDelivery:
    due = deliveries.claim(session, hold, [], [])
    assert due is not None
    return due


def the_one(session: Session) -> Delivery:
    session.expire_all()
    return session.scalars(select(Delivery)).one()


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_job_end_emits_one_event_with_ids_and_states(sessions: Sessions, state: JobState) -> None:
    with sessions.begin() as session:
        make_webhook(session)
        job = builders.make_job(session, JobKind.PREDICT, state, scans=1, metadata={"patient": "Erika"})
        data = {"job_id": str(job.id), "kind": "predict", "state": str(state)}
        ends = [row for row in delivered(session) if row[0] != "job.started"]
        assert ends == [(f"job.{state}", f"job_{job.id}_{state}", data)]


def test_partially_succeeded_batch_emits_its_event(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session)
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=1))
        assert [type_ for type_, _, _ in delivered(session)] == ["job.started", "job.partially_succeeded"]


def test_every_terminal_state_has_an_event_type() -> None:
    assert {f"job.{state}" for state in TERMINAL} == set(webhooks.JOB_ENDS)
    assert set(webhooks.JOB_EVENTS) - set(webhooks.JOB_ENDS) == {EventType.JOB_STARTED, EventType.JOB_PROGRESS}


def test_a_started_job_emits_one_event_however_often_it_is_claimed(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session, EventType.JOB_STARTED)
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=20)
        first, second = builders.units_of(session, job)
        lifecycle.requeue(session, builders.claim(session, first), "DRAINED")
        builders.claim(session, second)
        builders.claim(session, first)
        data = {"job_id": str(job.id), "kind": "predict_batch", "state": "running"}
        assert delivered(session) == [("job.started", f"job_{job.id}_started", data)]


def test_a_webhook_of_some_kinds_hears_of_those_jobs_and_of_models(sessions: Sessions) -> None:
    with sessions.begin() as session:
        webhooks.create(session, TENANT, URL, list(EventType), [JobKind.PREDICT, JobKind.PREDICT])
        for kind in (JobKind.INGEST, JobKind.PREDICT):
            builders.make_job(session, kind, JobState.FAILED, scans=int(kind == JobKind.PREDICT))
        webhooks.emit(session, TENANT, "drift", EventType.MODEL_DRIFTED, {})
        found = [(type_, data.get("kind")) for type_, _, data in delivered(session)]
    assert found == [("job.started", "predict"), ("job.failed", "predict"), ("model.drifted", None)]


# --- a job's own receiver ---

OWN = Receiver("https://ris.example/jobs/7", "whsec_own")


def own_of(session: Session) -> list[Webhook]:
    return list(session.scalars(select(Webhook).where(Webhook.of_jobs)))


def test_a_job_tells_the_receiver_that_it_names_and_no_other_job_does(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job_id = str(builders.make_job(session, JobKind.INGEST, JobState.FAILED, receiver=OWN).id)
        builders.make_job(session, JobKind.INGEST, JobState.FAILED)
        assert [type_ for type_, *_ in delivered(session)] == ["job.failed"]
    with sessions.begin() as session:
        due = claimed(session)
        assert (due.url, due.secret, due.data["job_id"]) == (OWN.url, OWN.secret, job_id)
        assert webhooks.list_webhooks(session, TENANT, 9).data == []
        with pytest.raises(WebhookNotFound):
            webhooks.get(session, TENANT, due.webhook_id)


def test_jobs_with_the_same_receiver_share_a_webhook_and_a_retry_keeps_it(sessions: Sessions) -> None:
    with sessions.begin() as session:
        started = replace(OWN, events=[EventType.JOB_STARTED])
        old = builders.make_job(session, JobKind.TRAIN, JobState.FAILED, receiver=started)
        builders.make_job(session, JobKind.INGEST, receiver=OWN)
        builders.make_job(session, JobKind.INGEST, receiver=replace(OWN, secret=""))
        again = submission.retry(session, TENANT, old.id)
        assert webhooks.receiver_of(session, again.id) == started
        assert len(own_of(session)) == 2


def test_a_receiver_that_had_unsubscribed_hears_of_the_next_job_that_names_it(sessions: Sessions) -> None:
    with sessions.begin() as session:
        builders.make_job(session, JobKind.INGEST, JobState.FAILED, receiver=OWN)
    with sessions.begin() as session:
        deliveries.record_attempt(session, claimed(session), Attempt(410, "gone"), RETRIES)
        builders.make_job(session, JobKind.INGEST, JobState.FAILED, receiver=OWN)
    with sessions.begin() as session:
        assert deliveries.claim(session, 60, [], []) is not None


def test_receivers_do_not_count_among_webhooks_and_go_when_nothing_refers_to_them(sessions: Sessions) -> None:
    with sessions.begin() as session:
        jobs = [
            builders.make_job(session, JobKind.INGEST, receiver=replace(OWN, url=f"{OWN.url}/{number}"))
            for number in range(webhooks.MAX_WEBHOOKS + 1)
        ]
        make_webhook(session)
        webhooks.prune(session, days=0)
        assert len(own_of(session)) == len(jobs)
        session.execute(delete(Job).where(Job.id != jobs[0].id))
        webhooks.prune(session, days=1)
        assert len(own_of(session)) == len(jobs)
        webhooks.prune(session, days=0)
        assert [webhook.url for webhook in own_of(session)] == [f"{OWN.url}/0"]
        assert len(webhooks.list_webhooks(session, TENANT, 9).data) == 1


def test_webhook_receives_its_events_of_its_own_tenant(sessions: Sessions) -> None:
    with sessions.begin() as session:
        one, other = make_webhook(session), make_webhook(session, EventType.JOB_SUCCEEDED)
        make_webhook(session, EventType.MODEL_PROMOTED)
        make_webhook(session, tenant_id="elsewhere")
        webhooks.emit(session, TENANT, "event", EventType.JOB_SUCCEEDED, {})
        assert set(session.scalars(select(Delivery.webhook_id))) == {one.id, other.id}


def test_event_emitted_twice_is_delivered_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session)
        for _ in range(2):
            webhooks.emit(session, TENANT, "model_7_drifted", EventType.MODEL_DRIFTED, {"version": 7})
        assert delivered(session) == [("model.drifted", "model_7_drifted", {"version": 7})]


def test_event_of_a_rolled_back_transaction_is_not_delivered(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session)
    with sessions() as session:
        webhooks.emit(session, TENANT, "event", EventType.JOB_FAILED, {})
        session.rollback()
        assert delivered(session) == []


def test_deleting_a_webhook_does_not_block_the_end_of_a_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        webhook = make_webhook(session)
    with sessions.begin() as deleting:
        webhooks.remove(deleting, TENANT, webhook.id)
        with sessions.begin() as session:
            builders.make_job(session, JobKind.PREDICT, JobState.SUCCEEDED, scans=1)
    with sessions() as session:
        assert delivered(session) == []


def test_webhook_limit_holds_for_concurrent_requests(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for _ in range(webhooks.MAX_WEBHOOKS - 1):
            make_webhook(session)
    refused: list[Exception] = []

    def make() -> None:
        try:
            with sessions.begin() as session:
                make_webhook(session)
        except TooManyWebhooks as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert "DELETE /webhooks/ID" in str(refused[0])


def make_version(sessions: Sessions) -> Job:
    """A succeeded training."""
    with sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel("a" * 64, ["Normal", "Tumor"], {}, builders.SCORES, "d" * 64, "abc123")
        promotion.register(session, held, new, GatePolicy())
    return job


SERVING = {"pipeline": "image", "task": "default"}


def test_model_events_leave_the_reason_out(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session, *(event for event in EventType if event.startswith("model.")))
    one, two = make_version(sessions), make_version(sessions)
    with sessions.begin() as session:
        promotion.promote(session, TENANT, "2", GatePolicy(), force=True, reason="Erika's scan")
        promotion.rollback(session, TENANT, reason="Erika's scan")
        found = delivered(session)
    ids = [event_id for _, event_id, _ in found]
    assert len(set(ids)) == 5
    assert ids[1].startswith("promotion_")
    assert [(type_, data) for type_, _, data in found] == [
        ("model.created", {"model_version": "1", "job_id": str(one.id), "promoted": True}),
        ("model.promoted", {"model_version": "1", "replaced": None, "how": "gate", **SERVING}),
        ("model.created", {"model_version": "2", "job_id": str(two.id), "promoted": False}),
        ("model.promoted", {"model_version": "2", "replaced": "1", "how": "force", **SERVING}),
        ("model.rolled_back", {"model_version": "1", "replaced": "2", "how": "rollback", **SERVING}),
    ]


# --- what becomes of a delivery ---


@pytest.fixture
def due(sessions: Sessions) -> None:
    """One delivery that is due."""
    with sessions.begin() as session:
        make_webhook(session)
        webhooks.emit(session, TENANT, "event", EventType.JOB_SUCCEEDED, {"state": "succeeded"})


@pytest.mark.usefixtures("due")
def test_claimed_delivery_is_held_until_the_claim_expires(sessions: Sessions) -> None:
    with sessions.begin() as session:
        first = claimed(session, hold=0.2)
        with sessions.begin() as other:
            assert deliveries.claim(other, 60, [], []) is None, "it is locked"
    with sessions.begin() as session:
        assert deliveries.claim(session, 60, [], []) is None, "it is held"
    threading.Event().wait(0.3)
    with sessions.begin() as session:
        again = claimed(session)
    assert (first.id, first.attempts, first.url) == (again.id, again.attempts - 1, URL)


@pytest.mark.usefixtures("due")
def test_busy_webhooks_and_full_tenants_are_skipped(sessions: Sessions) -> None:
    with sessions.begin() as session:
        webhook_id = the_one(session).webhook_id
        assert deliveries.claim(session, 60, [webhook_id], []) is None
        assert deliveries.claim(session, 60, [], [TENANT]) is None
        assert deliveries.claim(session, 60, [builders.unknown_id()], ["elsewhere"]) is not None


def emit(session: Session, *event_ids: str, tenant_id: str = TENANT) -> None:
    for event_id in event_ids:
        webhooks.emit(session, tenant_id, event_id, EventType.JOB_SUCCEEDED, {})


def next_of(sessions: Sessions, busy: Collection[uuid.UUID] = ()) -> DueDelivery:
    """The delivery that is claimed next."""
    with sessions.begin() as session:
        due = deliveries.claim(session, 60, busy, [])
    assert due is not None
    return due


def test_webhooks_take_turns_and_deliver_in_order(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_webhook(session)
        emit(session, "one", "two", "three")
        make_webhook(session, tenant_id="elsewhere")
        emit(session, "four", "five", tenant_id="elsewhere")
    assert [next_of(sessions).event_id for _ in range(5)] == ["one", "four", "two", "five", "three"]


def test_sixteen_unresponsive_receivers_do_not_starve_another(sessions: Sessions) -> None:
    with sessions.begin() as session:
        tenants = [f"silent-{number}" for number in range(4)]
        silent = {make_webhook(session, tenant_id=tenant).id for tenant in tenants for _ in range(4)}
        for tenant in tenants:
            emit(session, *(f"event-{number}" for number in range(5)), tenant_id=tenant)
    held: list[DueDelivery] = []
    for _ in silent:
        held.append(next_of(sessions, [due.webhook_id for due in held]))
    assert {due.webhook_id for due in held} == silent
    with sessions.begin() as session:
        healthy = make_webhook(session)
        emit(session, "healthy")
        deliveries.record_attempt(session, held[0], Attempt(None, "silent"), RETRIES)
    due = next_of(sessions, [due.webhook_id for due in held[1:]])
    assert (due.webhook_id, due.event_id) == (healthy.id, "healthy")


def test_delivery_claimed_by_another_dispatcher_is_skipped_without_waiting(sessions: Sessions) -> None:
    with sessions.begin() as session:
        one, other = make_webhook(session), make_webhook(session)
        emit(session, "event", "later")
    with sessions.begin() as first, sessions.begin() as second, sessions.begin() as third:
        assert {claimed(first).webhook_id, claimed(second).webhook_id} == {one.id, other.id}
        assert deliveries.claim(third, 60, [], []) is None


def test_webhook_being_deleted_is_skipped_without_waiting(sessions: Sessions) -> None:
    with sessions.begin() as session:
        gone, kept = make_webhook(session), make_webhook(session)
        emit(session, "event")
    with sessions.begin() as deleting:
        webhooks.remove(deleting, TENANT, gone.id)
        assert next_of(sessions).webhook_id == kept.id
        with sessions.begin() as session:
            assert deliveries.claim(session, 60, [], []) is None


def test_concurrent_claims_get_different_deliveries(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for _ in range(4):
            make_webhook(session)
        emit(session, *(f"event-{number}" for number in range(10)))
    found: list[uuid.UUID] = []

    def claim_all() -> None:
        while len(found) < 40:
            with sessions.begin() as session:
                due = deliveries.claim(session, 60, [], [])
            if due is not None:
                found.append(due.id)

    threads = [threading.Thread(target=claim_all, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == len(set(found)) == 40


def test_a_claim_reads_one_delivery_of_a_receiver_however_many_wait(sessions: Sessions) -> None:
    with sessions.begin() as session:
        silent, other = make_webhook(session), make_webhook(session, tenant_id="elsewhere")
        emit(session, "urgent", tenant_id="elsewhere")
        backlog = text(
            "INSERT INTO deliveries (id, webhook_id, tenant_id, event_id, type, data, next_at)"
            " SELECT gen_random_uuid(), :silent, :tenant, number::text, 'job.failed', '{}', now() - interval '1 hour'"
            " FROM generate_series(1, 5000) AS number"
        )
        session.execute(backlog, {"silent": silent.id, "tenant": TENANT})
    with sessions() as session:
        assert most_rows(session, lambda now: deliveries.claim(now, 60, [], [])) <= 2
    assert {next_of(sessions).webhook_id, next_of(sessions).webhook_id} == {silent.id, other.id}


def test_a_page_of_deliveries_reads_none_of_other_webhooks(sessions: Sessions) -> None:
    with sessions.begin() as session:
        old, new = make_webhook(session), make_webhook(session, tenant_id="elsewhere")
        many = text(
            "INSERT INTO deliveries (id, webhook_id, tenant_id, event_id, type, data)"
            " SELECT id, :webhook, :tenant, id::text, 'job.failed', '{}' FROM unnest(CAST(:ids AS uuid[])) AS id"
        )
        for webhook in (old, new):
            ids = [str(new_id()) for _ in range(3000)]
            session.execute(many, {"webhook": webhook.id, "tenant": webhook.tenant_id, "ids": ids})
    with sessions() as session:
        assert most_rows(session, lambda now: list_five(now, old), statement=1) <= 10
        first = list_five(session, old)
        assert [str(first.data[-1].id), True] == [first.next, first.has_more]
        later = deliveries.list_deliveries(session, TENANT, old.id, 5, first.data[-1].id)
        assert max(row.id for row in later.data) < first.data[-1].id


def list_five(session: Session, webhook: Webhook) -> Page[Delivery]:
    return deliveries.list_deliveries(session, webhook.tenant_id, webhook.id, 5, None)


@pytest.mark.usefixtures("due")
def test_retries_wait_longer_and_end_as_failed(sessions: Sessions) -> None:
    waits = []
    for _ in range(3):
        with sessions.begin() as session:
            session.execute(update(Delivery).values(next_at=dt.datetime(2000, 1, 1, tzinfo=dt.UTC)))
            held = claimed(session)
            deliveries.record_attempt(session, held, Attempt(500, "The receiver answered 500."), RETRIES)
        with sessions() as session:
            row = the_one(session)
        waits.append((row.next_at - held.now).total_seconds())
    assert (row.state, row.attempts, row.status, row.error) == ("failed", 3, 500, "The receiver answered 500.")
    assert row.ended_at is not None
    assert 5 <= waits[0] <= 6.1
    assert 300 <= waits[1] <= 361


@pytest.mark.usefixtures("due")
def test_stale_sender_records_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        slow = claimed(session, hold=0)
    with sessions.begin() as session:
        deliveries.record_attempt(session, claimed(session), Attempt(204), RETRIES)
        deliveries.record_attempt(session, slow, Attempt(None, "late"), RETRIES)
        row = the_one(session)
        assert (row.state, row.status, row.error, row.attempts) == ("delivered", 204, None, 2)


@pytest.mark.usefixtures("due")
def test_410_disables_the_webhook_and_keeps_it_listed(sessions: Sessions) -> None:
    with sessions.begin() as session:
        held = claimed(session)
        webhooks.emit(session, TENANT, "later", EventType.JOB_FAILED, {})
        deliveries.record_attempt(session, held, Attempt(410, "The receiver answered 410."), RETRIES)
        webhooks.emit(session, TENANT, "last", EventType.JOB_FAILED, {})
        rows = session.scalars(select(Delivery).order_by(Delivery.id)).all()
        assert [(row.event_id, row.state, row.status) for row in rows] == [
            ("event", "failed", 410),
            ("later", "failed", None),
        ]
        assert "410" in str(rows[1].error)
        assert session.scalars(select(Webhook.events)).all() == [[]]


@pytest.mark.usefixtures("due")
def test_failed_delivery_is_redelivered_with_one_attempt(sessions: Sessions) -> None:
    with sessions.begin() as session:
        deliveries.record_attempt(session, claimed(session), Attempt(500, "no"), ())
        row = the_one(session)
        deliveries.redeliver(session, TENANT, row.webhook_id, row.id)
        assert (the_one(session).state, the_one(session).ended_at) == ("pending", None)
    with sessions.begin() as session:
        deliveries.record_attempt(session, claimed(session), Attempt(500, "no"), ())
        assert (the_one(session).state, the_one(session).attempts) == ("failed", 2)


@pytest.mark.usefixtures("due")
@pytest.mark.parametrize("attempt", [Attempt(204), Attempt(500, "no")])
def test_redelivery_during_an_attempt_sends_once_more(sessions: Sessions, attempt: Attempt) -> None:
    with sessions.begin() as session:
        held = claimed(session)
    with sessions.begin() as session:
        deliveries.redeliver(session, TENANT, held.webhook_id, held.id)
    with sessions.begin() as session:
        deliveries.record_attempt(session, held, attempt, ())
        assert the_one(session).state == "pending"
    with sessions.begin() as session:
        again = claimed(session)
        deliveries.record_attempt(session, again, Attempt(204), ())
        assert (again.id, again.attempts, the_one(session).state) == (held.id, 2, "delivered")


@pytest.mark.usefixtures("due")
def test_old_deliveries_are_pruned(sessions: Sessions) -> None:
    with sessions.begin() as session:
        old = the_one(session)
        then = int((old.created_at - dt.timedelta(days=2)).timestamp() * 1000)
        session.execute(update(Delivery).values(id=uuid.UUID(int=(then << 80) + (old.id.int & (1 << 80) - 1))))
        assert deliveries.prune(session, days=1) == 0, "it is still to be sent"
        deliveries.record_attempt(session, claimed(session), Attempt(204), ())
        assert deliveries.prune(session, days=3) == 0
        assert deliveries.prune(session, days=1) == 1
        assert delivered(session) == []
