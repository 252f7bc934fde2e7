"""Webhooks on their way, to real receivers that behave well and badly."""

import datetime as dt
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from jobs.addresses import DEFAULT_PORTS
from jobs.db import Sessions
from jobs.events import deliveries, webhooks
from jobs.events.progress import emit_progress
from jobs.events.webhooks import EventType
from jobs.events.webhooks import Receiver as JobReceiver
from jobs.queue import lifecycle
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.settings import Settings
from jobs.states import JobKind, JobState, Lane
from jobs.tables import Delivery, Webhook
from tests import builders
from tests.builders import TENANT
from tests.processes import eventually
from tests.receivers import SHORT, Receiver, allowing, receiving
from worker.dispatcher import webhook_client
from worker.dispatcher import webhook_sender as sending
from worker.dispatcher.webhook_client import NO_ANSWER, DeliveryFailed, post
from worker.dispatcher.webhook_sender import MAX_PARALLEL, MAX_PARALLEL_PER_TENANT, sending_webhooks

TOKEN = "token-4711"  # of an address that nobody else may learn
DATA = {"job_id": "7", "state": "succeeded"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def subscribe(sessions: Sessions, url: str, tenant_id: str = TENANT) -> Webhook:
    with sessions.begin() as session:
        return webhooks.create(session, tenant_id, url, list(EventType))


def emit(sessions: Sessions, *event_ids: str, tenant_id: str = TENANT) -> None:
    with sessions.begin() as session:
        for event_id in event_ids:
            webhooks.emit(session, tenant_id, event_id, EventType.JOB_SUCCEEDED, DATA)


def ended(sessions: Sessions, number: int = 1) -> list[Delivery]:
    """All deliveries, once so many have ended."""

    def rows() -> list[Delivery]:
        with sessions() as session:
            return list(session.scalars(select(Delivery).order_by(Delivery.id)))

    eventually(
        lambda: sum(row.ended_at is not None for row in rows()) >= number, 20, lambda: str(list(map(vars, rows())))
    )
    return rows()


def test_a_delivery_is_what_standard_webhooks_says(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    webhook = subscribe(sessions, receiver.url)
    with sending_webhooks(allowing(settings, receiver)):
        emit(sessions, "job_7_succeeded")
        (received,) = receiver.first()
        (row,) = ended(sessions)
    event = received.verified(webhook.secret)
    assert (event["type"], event["data"], set(event)) == ("job.succeeded", DATA, {"type", "timestamp", "data"})
    assert dt.datetime.fromisoformat(event["timestamp"]) == row.created_at
    assert received.headers["content-type"] == "application/json"
    assert received.event_id == "job_7_succeeded"
    assert (row.state, row.attempts, row.status, row.error) == ("delivered", 1, 204, None)


def test_an_ended_prediction_tells_how_many_studies_have_which_disposition(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    """Two slices of one study, one of another; no UID leaves the house."""
    with sessions.begin() as session:
        webhook = webhooks.create(session, TENANT, receiver.url, [EventType.JOB_SUCCEEDED])
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=3)
        (unit,) = builders.units_of(session, job)
        held = builders.claim(session, unit)
        uids = ("1.2.1", "1.2.2", "1.2.1")
        outcomes = zip(builders.outcomes_of(session, held), uids, strict=True)
        found = [replace(one, identity={"study_uid": uid}) for one, uid in outcomes]
        lifecycle.succeed(session, held, outcomes=found)
    with sending_webhooks(allowing(settings, receiver)):
        (received,) = receiver.first()
    data = received.verified(webhook.secret)["data"]
    assert (data["job_id"], data["state"], data["studies"]) == (str(job.id), "succeeded", {"tumor": 2})


def test_the_body_has_what_the_client_calls_its_job_and_where_to_go_on_and_no_file_name(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    webhook = subscribe(sessions, receiver.url)
    with sessions.begin() as session:
        own = [NewResult(builders.make_scan(session).id, name="DOE^JANE.dcm", custom_id="order-7")]
        new = NewJob(TENANT, JobKind.PREDICT, Lane.URGENT, name="ward 3", metadata={"study": 7})
        job = submit(session, new, own)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    with sending_webhooks(allowing(settings, receiver)):
        started, ended_ = sorted(
            (received.verified(webhook.secret) for received in receiver.first(2)), key=lambda event: event["timestamp"]
        )
    assert (started["type"], ended_["type"]) == ("job.started", "job.succeeded")
    for event in (started, ended_):
        data = event["data"]
        assert (data["name"], data["metadata"], data["custom_id"]) == ("ward 3", {"study": 7}, "order-7")
        assert data["links"]["self"] == f"/v1/jobs/{job.id}"
        assert data["links"]["results"] == f"/v1/jobs/{job.id}/results"
    assert b"DOE" not in b"".join(received.body for received in receiver.received)
    with sessions() as session:
        kept = json.dumps(session.scalars(select(Delivery.data)).all())
    assert not [word for word in ("order-7", "ward 3", "study") if word in kept], "only ids are kept with a delivery"


def test_progress_is_that_of_the_moment_and_none_is_sent_of_an_ended_job(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    with sessions.begin() as session:
        webhooks.create(session, TENANT, receiver.url, [EventType.JOB_PROGRESS])
        jobs = [builders.make_job(session) for _ in range(2)]
        held = [builders.claim(session, builders.units_of(session, job)[0]) for job in jobs]
        for one in held:
            lifecycle.report(session, one, progress=0.2, seconds_left=60)
        emit_progress(session)
        lifecycle.report(session, held[0], progress=0.5, seconds_left=30)
        lifecycle.fail(session, held[1], builders.BROKEN)
        running, failed = (one.job_id for one in held)
    with sending_webhooks(allowing(settings, receiver)):
        rows = {row.job_id: row for row in ended(sessions, 2)}
    (received,) = receiver.received
    data = json.loads(received.body)["data"]
    assert (data["job_id"], data["progress"], data["state"]) == (str(running), 0.5, "running")
    assert 25 < data["eta_seconds"] <= 30
    late = rows[failed]
    assert (late.state, late.attempts, late.status) == ("failed", 1, None)
    assert "has ended" in str(late.error)


def test_a_failed_progress_is_not_sent_again(sessions: Sessions, settings: Settings) -> None:
    with receiving(500) as failing, sessions.begin() as session:
        webhooks.create(session, TENANT, failing.url, [EventType.JOB_PROGRESS])
        held = builders.claim(session, builders.units_of(session, builders.make_job(session))[0])
        lifecycle.report(session, held, progress=0.2)
        emit_progress(session)
        session.commit()
        with sending_webhooks(allowing(settings, failing)):
            (row,) = ended(sessions)
    assert (row.state, row.attempts) == ("failed", 1)


def test_a_receiver_of_a_job_without_a_secret_gets_no_signature(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    with sessions.begin() as session:
        builders.make_job(session, JobKind.INGEST, JobState.FAILED, receiver=JobReceiver(receiver.url))
    with sending_webhooks(allowing(settings, receiver)):
        (received,) = receiver.first()
    assert "webhook-signature" not in received.headers
    assert received.event_id.endswith("_failed")


def test_deliveries_due_before_the_start_are_sent_and_awaited_at_the_end(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    subscribe(sessions, receiver.url)
    emit(sessions, "one", "two")
    with sending_webhooks(allowing(settings, receiver)):
        receiver.first(2)
    assert [row.state for row in ended(sessions, 2)] == ["delivered"] * 2
    assert receiver.counted() == {"one": 1, "two": 1}


def test_an_error_is_retried_with_the_same_id(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    webhook = subscribe(sessions, receiver.url)
    receiver.statuses = [500, 429]
    with sending_webhooks(allowing(settings, receiver)):
        emit(sessions, "event")
        tries = receiver.first(3)
        (row,) = ended(sessions)
    assert {received.event_id for received in tries} == {"event"}
    assert all(received.verified(webhook.secret) for received in tries)
    assert (row.state, row.attempts, row.status, row.error) == ("delivered", 3, 204, None)


def test_a_delivery_fails_after_its_last_retry(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    subscribe(sessions, receiver.url)
    receiver.statuses = [500] * 10
    with sending_webhooks(allowing(settings, receiver)):
        emit(sessions, "event")
        (row,) = ended(sessions)
    assert (row.state, row.attempts, row.error) == ("failed", 4, "The receiver answered 500.")
    assert len(receiver.received) == 4


def test_410_ends_the_delivery_and_disables_the_webhook(
    sessions: Sessions, settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> None:
        time.sleep(3 * settings.sweep_seconds)  # the sender looks for more meanwhile
        record_attempt(*arguments)

    record_attempt = deliveries.record_attempt
    monkeypatch.setattr(deliveries, "record_attempt", slow)
    subscribe(sessions, receiver.url)
    receiver.statuses = [410]
    with receiving() as other, sending_webhooks(allowing(settings, receiver, other)):
        emit(sessions, "event", "waiting")
        row, waiting = ended(sessions, 2)
        subscribe(sessions, other.url)
        for event_id in ("later", "last"):  # once the other has the last one, there was time to send the first in vain
            emit(sessions, event_id)
            eventually(lambda event_id=event_id: other.counted()[event_id])
    assert (row.state, row.attempts, row.status) == ("failed", 1, 410)
    assert (waiting.state, waiting.attempts) == ("failed", 0)
    assert "nothing more is sent" in str(row.error)
    assert receiver.counted() == {"event": 1}


def test_a_redirect_is_not_followed(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    with receiving() as other:
        subscribe(sessions, f"http://{receiver.host}/to/{other.url}")
        with sending_webhooks(allowing(settings, receiver, other)):
            emit(sessions, "event")
            (row,) = ended(sessions)
        assert other.received == []
    assert (row.state, row.status) == ("failed", 307)
    assert "redirects are not followed" in str(row.error)


def test_dead_receivers_do_not_delay_others(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    with receiving() as dead:
        for _ in range(MAX_PARALLEL_PER_TENANT + 2):
            subscribe(sessions, f"http://{dead.host}/silent")
        subscribe(sessions, receiver.url, tenant_id="elsewhere")
        with sending_webhooks(allowing(settings, receiver, dead)):
            emit(sessions, *(f"dead-{number}" for number in range(5)))
            eventually(lambda: dead.received)
            began = time.monotonic()
            emit(sessions, *(f"alive-{number}" for number in range(10)), tenant_id="elsewhere")
            receiver.first(10)
            assert time.monotonic() - began < 3
            assert len({received.event_id for received in receiver.received}) == 10


def test_as_many_dead_receivers_as_threads_do_not_delay_others(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    tenants = [f"silent-{number}" for number in range(MAX_PARALLEL // MAX_PARALLEL_PER_TENANT)]
    with receiving() as dead:
        for tenant in tenants:
            for _ in range(MAX_PARALLEL_PER_TENANT):
                subscribe(sessions, f"http://{dead.host}/silent", tenant_id=tenant)
            emit(sessions, *(f"dead-{number}" for number in range(15)), tenant_id=tenant)
        subscribe(sessions, receiver.url)
        with sending_webhooks(allowing(settings, receiver, dead)):
            dead.first(MAX_PARALLEL)
            emit(sessions, "alive")
            receiver.first(seconds=4)


def test_one_webhook_gets_one_delivery_at_a_time(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    subscribe(sessions, f"http://{receiver.host}/silent")
    with sending_webhooks(allowing(settings, receiver).model_copy(update={"webhook_seconds": 2})):
        emit(sessions, "one", "two", "three")
        receiver.first()
        time.sleep(0.5)
        assert len(receiver.received) == 1


def test_a_redelivery_arrives_again(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    webhook = subscribe(sessions, receiver.url)
    with sending_webhooks(allowing(settings, receiver)):
        emit(sessions, "event")
        (row,) = ended(sessions)
        with sessions.begin() as session:
            deliveries.redeliver(session, TENANT, webhook.id, row.id)
        receiver.first(2)
        (row,) = ended(sessions)
    assert (row.state, row.attempts, receiver.counted()) == ("delivered", 2, {"event": 2})


def test_nothing_more_is_sent_to_a_webhook_that_was_deleted(
    sessions: Sessions, settings: Settings, receiver: Receiver
) -> None:
    webhook = subscribe(sessions, receiver.url)
    receiver.statuses = [500] * 10
    quick = allowing(settings, receiver).model_copy(update={"webhook_retry_seconds": "1,1,1"})
    with sending_webhooks(quick):
        emit(sessions, "event")
        receiver.first()
        with sessions.begin() as session:
            webhooks.remove(session, TENANT, webhook.id)
        time.sleep(1.5)
    assert len(receiver.received) == 1


def test_two_dispatchers_send_each_event_once(sessions: Sessions, settings: Settings, receiver: Receiver) -> None:
    events = {f"event-{number}": 1 for number in range(40)}
    webhooks_ = [subscribe(sessions, receiver.url, tenant_id=f"tenant-{number}") for number in range(4)]
    with sending_webhooks(allowing(settings, receiver)), sending_webhooks(allowing(settings, receiver)):
        for number, webhook in enumerate(webhooks_):
            emit(sessions, *list(events)[number::4], tenant_id=webhook.tenant_id)
        ended(sessions, 40)
    assert receiver.counted() == events


def test_sending_resumes_after_the_database_was_away(
    sessions: Sessions, settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe(sessions, receiver.url)
    monkeypatch.setattr(deliveries, "claim", failing_at_first(deliveries.claim, OSError("the database is away")))
    with sending_webhooks(allowing(settings, receiver)):
        emit(sessions, "event")
        receiver.first()


# --- one request ---


@pytest.mark.parametrize("path", ["silent", "drip"])
def test_a_slow_receiver_is_disconnected_at_the_deadline(path: str, settings: Settings, receiver: Receiver) -> None:
    began = time.monotonic()
    with pytest.raises(DeliveryFailed, match=r"did not answer within 0.5 s \(RENALQ_WEBHOOK_SECONDS\)"):
        post(f"http://{receiver.host}/{path}/{TOKEN}", b"{}", {}, allowing(settings, receiver))
    assert time.monotonic() - began < 1.5


@contextmanager
def heard(listener: socket.socket) -> Iterator[list[str]]:
    """The lines of the one request that comes as long as the block lasts; it is answered 200."""
    asked: list[str] = []

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            asked.extend(connection.recv(10_000).decode().split("\r\n"))
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield asked
    thread.join(10)


def test_a_url_with_a_query_is_sent_unchanged(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        quick = settings.model_copy(update={"webhook_hosts": host})
        with heard(listener) as asked:
            assert post(f"http://{host}//hook?a=1&b=%2F#here", b"{}", {}, quick) == 200
    assert asked[0] == "POST //hook?a=1&b=%2F HTTP/1.1"
    assert f"Host: {host}" in asked


def test_an_ipv6_address_works_with_and_without_a_port(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no ::1")
    with listener:
        port = listener.getsockname()[1]
        monkeypatch.setitem(DEFAULT_PORTS, "http", port)  # that of the test: 80 is not for everybody to listen at
        for host in (f"[::1]:{port}", "[::1]"):
            quick = settings.model_copy(update={"webhook_hosts": host})
            with heard(listener) as asked:
                assert post(f"http://{host}/hook", b"{}", {}, quick) == 200
            assert f"Host: [::1]:{port}" in asked


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://[2606:4700::abcd]/hook", "[2606:4700::abcd]"),
        ("https://[2606:4700::1111]/hook", "[2606:4700::1111]"),
        ("https://[2606:4700::1111]:8443/hook", "[2606:4700::1111]:8443"),
        ("http://[2606:4700::1111]:443/hook", "[2606:4700::1111]:443"),
        ("http://ris.example:80/hook", "ris.example"),
        ("https://ris.example/hook", "ris.example"),
        ("https://ris.example:80/hook", "ris.example:80"),
    ],
)
def test_the_host_header_has_the_port_unless_it_is_the_default(url: str, host: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, heard(listener) as asked, socket.create_connection(listener.getsockname()) as sock:
        webhook_client._exchange(urlsplit(url), sock, b"{}", {})
    assert f"Host: {host}" in asked


def test_a_silent_name_server_does_not_delay_past_the_deadline(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def silent(*_: Any, **__: Any) -> list[Any]:
        over.wait(5)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    began = time.monotonic()
    with pytest.raises(DeliveryFailed, match="did not answer within"):
        post("http://ris.example/hook", b"{}", {}, settings.model_copy(update=SHORT))
    assert time.monotonic() - began < 1.5
    over.set()


@pytest.mark.parametrize("url", ["http://{host}/", "http://no-such-host.invalid/", "http://" + "a" * 64 + ".example/"])
def test_errors_contain_nothing_of_the_url_nor_why_there_was_no_answer(url: str, settings: Settings) -> None:
    with receiving() as gone:
        pass
    with pytest.raises(DeliveryFailed) as caught:
        post(url.format(host=gone.host) + TOKEN, b"{}", {}, allowing(settings, gone))
    assert str(caught.value) == NO_ANSWER.format(seconds=SHORT["webhook_seconds"])
    assert caught.value.__suppress_context__


def test_no_log_and_no_row_contains_a_url(
    sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All goes wrong that is logged, each time with the address in the error."""
    url = f"https://ris.example/hook/{TOKEN}"
    lost = OperationalError(url, {"url": url}, Exception(url))
    monkeypatch.setattr(deliveries, "claim", failing_at_first(deliveries.claim, OSError(url)))
    monkeypatch.setattr(deliveries, "record_attempt", failing_at_first(deliveries.record_attempt, lost))
    monkeypatch.setattr(sending, "post", failing_at_first(post, *[RuntimeError(url)] * 10))
    subscribe(sessions, url)
    quick = settings.model_copy(update={**SHORT, "lease_seconds": 0.1})
    with structlog.testing.capture_logs() as logged, sending_webhooks(quick):
        emit(sessions, "event")
        (row,) = ended(sessions)
    assert {line["event"] for line in logged} == {"deliveries_interrupted", "webhook_not_sent", "delivery_not_recorded"}
    assert (row.state, row.error) == ("failed", "It could not be sent (RuntimeError).")
    assert TOKEN not in str(logged)


def failing_at_first(real: Callable[..., Any], *given: Exception) -> Callable[..., Any]:
    """As the real one, once each of the errors was raised."""
    errors = list(given)

    def shaky(*arguments: object) -> Any:
        if errors:
            raise errors.pop()
        return real(*arguments)

    return shaky


# --- TLS ---


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of localhost that is its own authority, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    begun = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    dated = (
        begun.serial_number(1).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
    )
    signed = dated.add_extension(names, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "localhost.pem"
    path.write_bytes(private + signed.public_bytes(pem))
    return path


@pytest.fixture
def secure(certificate: Path, receiver: Receiver) -> Receiver:
    """The receiver, with TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True, do_handshake_on_connect=False)
    return receiver


def test_https_checks_the_name_of_the_certificate(
    secure: Receiver, certificate: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_client, "_tls", lambda: ssl.create_default_context(cafile=certificate))
    quick = allowing(settings, secure).model_copy(update={"webhook_hosts": f"localhost:{secure.server_port}"})
    assert post(f"https://localhost:{secure.server_port}/hook", b"{}", {}, quick) == 204
    with pytest.raises(DeliveryFailed, match="did not answer within"):
        post(f"https://localhost:{secure.server_port}/drip", b"{}", {}, quick)
    quick = allowing(settings, secure)
    with pytest.raises(DeliveryFailed, match="did not answer"):
        post(f"https://127.0.0.1:{secure.server_port}/hook", b"{}", {}, quick)
    assert len(secure.received) == 2


def test_an_untrusted_certificate_is_refused(secure: Receiver, settings: Settings) -> None:
    quick = allowing(settings, secure).model_copy(update={"webhook_hosts": f"localhost:{secure.server_port}"})
    with pytest.raises(DeliveryFailed, match="did not answer"):
        post(f"https://localhost:{secure.server_port}/hook", b"{}", {}, quick)
    assert secure.received == []
