"""Rate limits: of a key, and of an address with invalid keys; with Redis, without it, and with one that hangs."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api import create_app
from api.http.context import EXTENSION
from api.http.traffic import rates
from api.http.traffic.rates import Counters
from cli.stack.server_plan import free_port
from jobs.db import Sessions
from jobs.settings import Settings
from tests.api.conftest import Door
from tests.api.test_errors import assert_problem
from tests.applications import application
from tests.faults.servers import own_redis

LIMITS = {"rate_key": "5/day", "rate_failed_login": "3/day"}
"""By the day, so that no window ends during a test."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Low limits."""
    return settings.model_copy(update=LIMITS)


def get(app: Flask, key: str, address: str = "192.0.2.1") -> TestResponse:
    headers = {"Authorization": f"Bearer {key}"}
    return app.test_client().get("/jobs", headers=headers, environ_base={"REMOTE_ADDR": address})


def someone() -> str:
    """An address that no other test has."""
    number = uuid.uuid4().int
    return f"10.{number % 250}.{number // 250 % 250}.{number // 62_500 % 250}"


def test_a_key_is_told_what_is_left_and_then_to_wait(client: FlaskClient, door: Door) -> None:
    for left in range(4, -1, -1):
        answer = client.get("/jobs")
        assert answer.status_code == 200
        assert answer.headers["RateLimit-Policy"] == '"day";q=5;w=86400'
        assert answer.headers["RateLimit"].startswith(f'"day";r={left};t=')
    answer = client.get("/jobs")
    assert "5 in one day" in assert_problem(answer, 429, "RATE_LIMITED")["detail"]
    assert 0 < int(answer.headers["Retry-After"]) <= 86_400
    assert answer.headers["RateLimit"].startswith('"day";r=0;t=')
    assert door.client().get("/jobs").status_code == 200, "another key of the same tenant"


def test_an_address_that_sends_invalid_keys_is_told_to_wait_and_its_valid_keys_go_on(
    app: Flask, client: FlaskClient
) -> None:
    address = someone()
    for number in range(3):
        assert_problem(get(app, f"rq_{number}", address), 401)
    answer = get(app, "rq_another", address)
    assert "invalid key" in assert_problem(answer, 429, "RATE_LIMITED")["detail"]
    assert int(answer.headers["Retry-After"]) > 0
    assert_problem(get(app, "rq_another", someone()), 401)
    assert client.get("/jobs", environ_base={"REMOTE_ADDR": address}).status_code == 200
    assert_problem(app.test_client().get("/jobs", environ_base={"REMOTE_ADDR": address}), 401)


@pytest.mark.parametrize(("proxies", "statuses"), [(0, [401, 401, 401, 429]), (1, [401] * 4)])
def test_the_address_is_the_one_that_a_trusted_proxy_tells(
    settings: Settings, proxies: int, statuses: list[int]
) -> None:
    app, proxy = create_app(settings.model_copy(update={"proxies": proxies})), someone()

    def status(client: str) -> int:
        headers = {"Authorization": "Bearer wrong", "X-Forwarded-For": f"{someone()}, {client}"}
        return app.test_client().get("/jobs", headers=headers, environ_base={"REMOTE_ADDR": proxy}).status_code

    assert [status(someone()) for _ in range(4)] == statuses
    attacker = someone()
    assert [status(attacker) for _ in range(4)][-1] == 429, "what the client itself has put before it does not count"
    app.extensions[EXTENSION].listener.close()
    app.extensions[EXTENSION].sessions.kw["bind"].dispose()


def test_a_client_with_many_ipv6_addresses_is_one_client(app: Flask) -> None:
    number = uuid.uuid4().hex
    network = f"2001:db8:{number[:4]}:{number[4:8]}"
    statuses = [get(app, "rq_wrong", f"{network}::{host}").status_code for host in range(1, 5)]
    assert statuses == [401, 401, 401, 429]
    mapped = someone()
    assert [get(app, "rq_wrong", f"{prefix}{mapped}").status_code for prefix in ("", "::ffff:", "", "")][-1] == 429


def test_all_processes_of_the_api_count_together(settings: Settings) -> None:
    (limit,), whose = rates._parsed("5/day"), uuid.uuid4().hex
    one, another = Counters(settings.redis_url), Counters(settings.redis_url)
    assert [counters.add(limit, whose).count for counters in (one, another, one)] == [1, 2, 3]


@pytest.fixture
def away(settings: Settings) -> Settings:
    """A Redis that is not there."""
    return settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0", "rate_key": "100/day"})


def test_without_redis_nobody_is_refused_or_waits_and_the_limits_hold(away: Settings, sessions: Sessions) -> None:
    with application(away, sessions) as app:
        client, began = Door(app, sessions).client(), time.monotonic()
        assert [client.get("/jobs").status_code for _ in range(101)] == [200] * 100 + [429]
        assert time.monotonic() - began < 5


def test_a_redis_that_hangs_costs_one_request_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (limit,), took = rates._parsed("1000/day"), []
    with own_redis(tmp_path) as redis:
        counters = Counters(redis.url)
        assert counters.add(limit, "me").count == 1
        redis.pause()
        for count in range(1, 21):  # it counts for itself, from 1
            began = time.monotonic()
            assert counters.add(limit, "me").count == count
            took.append(time.monotonic() - began)
        assert took[0] < 2 * rates.ANSWER_SECONDS
        assert max(took[1:]) < 0.1
        redis.resume()
        monkeypatch.setattr(counters, "_memory_until", time.monotonic())
        assert counters.add(limit, "me").count in (2, 3), "the one that timed out may have been counted"


@pytest.mark.parametrize("text", ["1000/second", "100/second;2000/minute", "", " 5/day ; 1/hour "])
def test_a_setting_that_can_be_read_is_read(text: str) -> None:
    assert len(rates._parsed(Settings(rate_key=text).rate_key)) == len([one for one in text.split(";") if one.strip()])


@pytest.mark.parametrize("text", ["many", "0/second", "5 per minute", "5/fortnight", "5/minute;", "-1/second"])
def test_a_setting_that_cannot_be_read_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="NUMBER/second"):
        Settings(rate_failed_login=text)


@pytest.fixture
def by_default(settings: Settings, sessions: Sessions) -> Iterator[Flask]:
    """The application with the limits that nobody has changed."""
    fields = Settings.model_fields
    with application(settings.model_copy(update={name: fields[name].default for name in LIMITS}), sessions) as app:
        yield app


def test_a_key_that_polls_as_fast_as_it_can_is_served(by_default: Flask, sessions: Sessions) -> None:
    poll: Callable[[], TestResponse] = lambda: client.get("/jobs?limit=1")  # noqa: E731
    client = Door(by_default, sessions).client()
    assert {poll().status_code for _ in range(300)} == {200}
