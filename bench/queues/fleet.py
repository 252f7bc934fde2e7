"""Simulated workers: threads that take messages from Redis, claim units, hold them, and end them.

Claims, ends and signs of life are the product's own functions; only the work is replaced by sleep.
"""

from __future__ import annotations

import base64
import json
import random
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from jobs.db import session_factory
from jobs.queue import leases, lifecycle, processes

LANES = ("urgent", "batch")
ALIVE_SECONDS, LEASE_SECONDS = 5.0, 300.0  # nobody beats here


class Fleet:
    """So many workers. `hold`: seconds that a unit takes, drawn evenly from these two; `release` ends all at once."""

    def __init__(self, database_url: str, redis_url: str, size: int) -> None:
        # Their own connections are not measured, so they share a few.
        self._sessions = session_factory(database_url, pool_size=16, application="bench-fleet")
        self._redis_url, self.size = redis_url, size
        self.hold = (1.0, 1.0)
        self.release, self._ended = threading.Event(), threading.Event()
        self.names = [f"bench-{number}@fleet/1" for number in range(size)]

    @contextmanager
    def working(self) -> Iterator[Fleet]:
        """The workers, for the length of the block."""
        targets = [self._stay_alive, *(lambda name=name: self._work(name) for name in self.names)]
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self.release.set()
            for thread in threads:
                thread.join(10)

    def _stay_alive(self) -> None:
        while True:
            with self._sessions.begin() as session:
                for name in self.names:
                    processes.upsert(session, processes.Heartbeat(name, processes.WORKER, LANES))
            if self._ended.wait(ALIVE_SECONDS):
                return

    def _work(self, name: str) -> None:
        with redis.Redis.from_url(self._redis_url) as messages:
            while not self._ended.is_set():
                message = messages.brpop(LANES, timeout=1)
                if message is not None:
                    self._run(_unit_of(message[1]), f"{name}/1")

    def _run(self, unit_id: uuid.UUID, worker: str) -> None:
        with self._sessions.begin() as session:
            claim = leases.claim(session, unit_id, worker, LEASE_SECONDS)
        if claim is None:
            return
        self.release.wait(random.uniform(*self.hold))
        with self._sessions.begin() as session:
            lifecycle.succeed(session, claim)


def _unit_of(message: bytes) -> uuid.UUID:
    """The unit's id in a message of Celery's protocol: its body is [args, kwargs, …] in base64."""
    _, keywords, *_ = json.loads(base64.b64decode(json.loads(message)["body"]))
    return uuid.UUID(keywords["unit_id"])
