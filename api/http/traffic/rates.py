"""Rate limits of keys and of failed logins, counted in Redis for all processes of the API together.

While Redis does not answer, each process counts for itself: that refuses nobody who keeps to the limits, and one
request in `RETRY_SECONDS` asks Redis again. A limit costs one round trip.

Windows are fixed and begin with the clock, so that the name of a counter says when it ends. The headers are those of
draft-ietf-httpapi-ratelimit-headers-10.
"""

import ipaddress
import math
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import structlog
from flask import Flask, Response, g
from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage, Storage, storage_from_string

from jobs.errors import RateLimited
from jobs.settings import Settings

ANSWER_SECONDS = 0.25
"""How long Redis may take to answer or to be connected to: it answers in less than a thousandth of that."""
RETRY_SECONDS = 5.0
"""How long the process counts for itself before it asks Redis again."""
CONNECTIONS = 1024
"""To Redis at most; redis-py's default of 100 would be an error for the 101st request at the same time."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Spent:
    """How much of a limit is used in the window that ends in `seconds`."""

    limit: RateLimitItem
    count: int
    seconds: int

    @property
    def exceeded(self) -> bool:
        """Whether this request is one too many."""
        return self.count > self.limit.amount

    @property
    def name(self) -> str:
        """The policy's name in the headers: `second`, `minute`, `hour` or `day`."""
        return self.limit.GRANULARITY.name

    def refusal(self, whose: str) -> RateLimited:
        """The error of a request that is one too many."""
        return RateLimited(amount=self.limit.amount, unit=self.name, whose=whose, seconds=self.seconds)


class Counters:
    """Counters of events in windows of time, in Redis or else in memory.

    Args:
        url: of Redis.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._memory_until = 0.0

    def add(self, limit: RateLimitItem, *whose: str) -> Spent:
        """Count an event."""
        now, length = time.time(), limit.get_expiry()
        window, elapsed = divmod(now, length)
        counter = limit.key_for(*whose, str(int(window)))
        return Spent(limit, self._increment(counter, length), math.ceil(length - elapsed))

    def _increment(self, counter: str, seconds: int) -> int:
        if self._asks_redis():
            try:
                count = self._redis.incr(counter, seconds)
            except Exception as error:  # any: whatever is wrong with Redis, requests are served
                self._memory_until = time.monotonic() + RETRY_SECONDS
                log.warning("rate_limits_in_memory", error=type(error).__name__)
            else:
                self._memory_until = 0.0
                return count
        return self._memory.incr(counter, seconds)

    def _asks_redis(self) -> bool:
        """Whether this request asks Redis: after a failure, one in `RETRY_SECONDS`."""
        if not self._memory_until:
            return True
        with self._lock:
            if time.monotonic() < self._memory_until:
                return False
            self._memory_until = time.monotonic() + RETRY_SECONDS  # for all others, until this one has an answer
            return True

    @cached_property
    def _redis(self) -> Storage:
        """Made by the first request that counts: it loads redis-py. Without its retries, which wait for seconds."""
        url = self._url.replace("redis+socket://", "redis+unix://")  # as Celery writes it
        timeouts = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS}
        options: dict[str, Any] = {**timeouts, "retry": None, "max_connections": CONNECTIONS}
        return cast(Storage, storage_from_string(url, **options))

    @cached_property
    def _memory(self) -> MemoryStorage:
        return MemoryStorage()


class Rates:
    """The limits in the settings."""

    def __init__(self, settings: Settings) -> None:
        self._of_key, self._of_failures = _parsed(settings.rate_key), _parsed(settings.rate_failed_login)
        self._counters = Counters(settings.redis_url)

    def count_request(self, key_id: uuid.UUID) -> None:
        """Count a request with a valid key.

        Raises:
            RateLimited
        """
        g.spent = [self._counters.add(limit, "key", str(key_id)) for limit in self._of_key]
        _refuse(g.spent, "with this key")

    def count_failed_login(self, address: str) -> None:
        """Count a request with an invalid key. Valid keys of the same address are never refused for it: many clients
        may share the address of a proxy, and no number of attempts finds 256 random bits.

        Raises:
            RateLimited
        """
        network = _network(address)
        _refuse([self._counters.add(limit, "login", network) for limit in self._of_failures], "with an invalid key")


def _parsed(text: str) -> list[RateLimitItem]:
    return parse_many(text) if text.strip() else []


def _refuse(spent: list[Spent], whose: str) -> None:
    exceeded = [one for one in spent if one.exceeded]
    if exceeded:
        raise max(exceeded, key=lambda one: one.seconds).refusal(whose)


def _network(address: str) -> str:
    """What one client can choose its address from: an IPv6 client has a /64."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    mapped = getattr(found, "ipv4_mapped", None)
    if mapped is not None or found.version == 4:
        return str(mapped or found)
    return str(ipaddress.ip_network((int(found), 64), strict=False))


def register(app: Flask) -> None:
    """Tell each client with a key how much of its limits is left."""
    app.after_request(_add_headers)


def _add_headers(response: Response) -> Response:
    spent: list[Spent] = getattr(g, "spent", [])
    if spent:
        policies = (f'"{one.name}";q={one.limit.amount};w={one.limit.get_expiry()}' for one in spent)
        left = (f'"{one.name}";r={max(0, one.limit.amount - one.count)};t={one.seconds}' for one in spent)
        response.headers["RateLimit-Policy"] = ", ".join(policies)
        response.headers["RateLimit"] = ", ".join(left)
    return response
