"""Cases 24 (its second half) and 39 of the acceptance: each event goes out once, and to no place inside."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select

from jobs.addresses import NOT_PUBLIC, webhook_url_error
from jobs.db import Sessions
from jobs.events import webhooks
from jobs.events.webhooks import EventType
from jobs.settings import Settings
from jobs.tables import Delivery
from tests.builders import TENANT
from tests.faults.sabotage import Sabotage
from tests.faults.work import single
from tests.processes import Stack, eventually, stack
from tests.receivers import Receiver, allowing, receiving
from worker.dispatcher.webhook_client import NO_ANSWER, DeliveryFailed, post

pytestmark = pytest.mark.faults

INSIDE = [
    "127.0.0.1", "127.9.9.9", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "0.0.0.0", "0", "[::1]", "[::]",  # noqa: S104
    "localhost", "LOCALHOST.", "receiver.localhost",
    "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "198.18.0.1", "[fc00::1]", "[fec0::1]",
    "169.254.1.1", "[fe80::1]", "[fe80::1%25lo]",
    "169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "[fd00:ec2::254]",
    "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    "[2001:0:7f00:1::1]", "224.0.0.1", "[ff02::1]", "255.255.255.255",
]  # fmt: skip
"""This machine, its network and its cloud, in all the dresses that a connection takes."""
PUBLIC = "93.184.215.14"


@contextmanager
def hooked(fast: Settings, sessions: Sessions, receiver: Receiver) -> Iterator[Stack]:
    """A stack whose one webhook hears of everything."""
    with sessions.begin() as session:
        webhooks.create(session, TENANT, receiver.url, list(EventType))
    with stack(allowing(fast, receiver), sessions) as processes:
        yield processes


def delivered(sessions: Sessions) -> list[Delivery]:
    """The deliveries that have arrived, oldest first."""
    with sessions() as session:
        return list(session.scalars(select(Delivery).where(Delivery.state == "delivered").order_by(Delivery.id)))


def test_24_two_dispatchers_and_a_webhook(fast: Settings, sessions: Sessions, plan: Sabotage) -> None:
    """Two dispatchers → no webhook sent twice for one event.

    Guard: `FOR UPDATE SKIP LOCKED` in `deliveries.claim`, and the next try that it moves ahead and commits before
    anything is sent. Without that both dispatchers send what is due.
    """
    plan.network()
    with receiving() as receiver, hooked(fast, sessions, receiver) as processes:
        for name in ("one", "other"):
            processes.start("dispatcher", name)
        processes.start("predict", environ=plan.environ())
        jobs = [single(processes) for _ in range(20)]
        assert [processes.wait_for(job_id).state for job_id in jobs] == ["succeeded"] * 20, processes.logs()
        ends = {f"job_{job_id}_succeeded" for job_id in jobs}
        eventually(lambda: ends <= {row.event_id for row in delivered(sessions)}, 30, processes.logs)
    assert ends <= set(receiver.counted())
    assert set(receiver.counted().values()) == {1}


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("after", 2)])
def test_24_a_dispatcher_killed_while_it_sends(
    when: str, times: int, fast: Settings, sessions: Sessions, plan: Sabotage
) -> None:
    """A dispatcher killed between its claim and the answer → sent again, with the same id.

    Guard: a claim runs out. Were a delivery marked as sent before it is, the event would be lost.
    """
    death = plan.at("worker.dispatcher.webhook_client:post", "kill", when=when)
    with receiving() as receiver, hooked(fast, sessions, receiver) as processes:
        processes.start("dispatcher", "first", environ=plan.environ())
        with sessions.begin() as session:
            webhooks.emit(session, TENANT, "event", EventType.MODEL_DRIFTED, {"version": 7})
        eventually(death.happened, 30, processes.logs)
        processes.start("dispatcher", "second")
        (row,) = eventually(lambda: delivered(sessions), 30, processes.logs)
        assert row.attempts == 2
        assert receiver.counted() == {"event": times}


# --- 39: a webhook to loopback, link-local, mapped IPv6, a name that rebinds, a redirect → refused ---


@pytest.mark.parametrize("host", INSIDE)
def test_39_an_address_inside_is_refused_when_it_is_given(host: str) -> None:
    """Guard: `addresses.webhook_complaint`. Without it a client learns only by its deliveries that none arrives."""
    for url in (f"http://{host}/hook", f"https://{host}:8443/hook"):
        assert webhook_url_error(url, frozenset()) == NOT_PUBLIC


@pytest.mark.parametrize("host", INSIDE)
def test_39_an_address_inside_is_refused_when_it_is_sent_to(
    host: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: the numbers that a name leads to are looked at before a connection is made (`addresses.is_public`)."""
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection was made"))
    with pytest.raises(DeliveryFailed):
        post(f"http://{host}/hook", b"{}", {}, settings)


def test_39_a_receiver_on_this_machine_hears_nothing_unless_it_is_named(fast: Settings, sessions: Sessions) -> None:
    """The whole way, with a webhook that was made when its host was still allowed."""
    with receiving() as receiver, hooked(fast, sessions, receiver) as processes:
        processes.settings = processes.settings.model_copy(update={"webhook_hosts": ""})
        processes.start("dispatcher")
        with sessions.begin() as session:
            webhooks.emit(session, TENANT, "event", EventType.MODEL_DRIFTED, {"version": 7})

        def refused() -> Delivery | None:
            with sessions() as session:
                return session.scalar(select(Delivery).where(Delivery.state == "failed"))

        told = NO_ANSWER.format(seconds=processes.settings.webhook_seconds)
        assert eventually(refused, 30, processes.logs).error == told
        assert receiver.received == []


def test_39_a_name_that_rebinds(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard: one look at the name, and the connection goes to the number that was looked at. Were the name handed on,
    the second look would lead inside."""
    asked: list[object] = []
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    def rebinding(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80)) for number in next(answers)]

    def refusing(address: object, **_: Any) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket, "create_connection", refusing)
    with pytest.raises(DeliveryFailed, match="refused the connection"):
        post("http://rebinds.example/hook", b"{}", {}, settings)
    assert asked == [(PUBLIC, 80)]
    with pytest.raises(DeliveryFailed, match="not public must be in"):
        post("http://rebinds.example/hook", b"{}", {}, settings)
    assert asked == [(PUBLIC, 80)]


def test_39_of_a_name_with_two_faces_only_the_public_one_is_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: each number that a name leads to is looked at, not only the first."""
    asked: list[str] = []
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80)) for number in (PUBLIC, "10.0.0.1", "1.1.1.1")]

    def refusing(address: tuple[str, int], **_: Any) -> None:
        asked.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", refusing)
    with pytest.raises(DeliveryFailed):
        post("http://two-faced.example/hook", b"{}", {}, settings)
    assert asked == [PUBLIC, "1.1.1.1"]


def test_39_a_redirect_to_the_inside(settings: Settings) -> None:
    """Guard: redirects are not followed, wherever they lead."""
    with receiving() as allowed, receiving() as inside:
        quick = allowing(settings, allowed)
        assert post(f"http://{allowed.host}/to/{inside.url}", b"{}", {}, quick) == 307
        assert (len(allowed.received), inside.received) == (1, [])
