"""The only publisher. It rings doorbells for units that nobody has claimed, and takes back lost leases.

It listens for NOTIFY, and sweeps behind that: a notification may be missed, a sweep is not. Several dispatchers may run
at once; each row is rung by one of them (SKIP LOCKED). Run it with `python -m worker.dispatcher`.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg2
import redis
import structlog
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy.exc import SQLAlchemyError

from jobs import doorbells, lifecycle, logs, processes
from jobs.db import Sessions, listening, session_factory
from jobs.settings import Settings
from jobs.states import Lane
from worker.app import TASK_OF, ring

log = structlog.get_logger()

Ring = Callable[[str, Lane, str], None]
LOST_DATABASE = (SQLAlchemyError, psycopg2.Error)


class Every:
    """True at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        """Whether it is time; the next time is reckoned from now."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Dispatcher:
    """One dispatcher. `step()` is all that it does; `run()` repeats it."""

    def __init__(self, settings: Settings, sessions: Sessions, ring: Ring = ring) -> None:
        self._settings, self._sessions, self._ring = settings, sessions, ring
        self._stop = threading.Event()
        self._reaping = Every(min(5.0, settings.lease_seconds / 4))
        self._living = Every(settings.process_seconds)
        self._name = f"dispatcher@{socket.gethostname()}/{os.getpid()}"

    def run(self) -> None:
        """Work until `stop()`. Postgres going away is waited out."""
        while not self._stop.is_set():
            try:
                self._serve()
            except LOST_DATABASE as error:
                log.warning("database_lost", error=type(error).__name__)
                self._stop.wait(1)
        with suppress(*LOST_DATABASE), self._sessions.begin() as session:  # else the row grows old by itself
            processes.gone(session, self._name)

    def stop(self) -> None:
        """End `run()` after its step."""
        self._stop.set()

    def step(self) -> None:
        """Ring what waits; at its time reap what is lost and give a sign of life."""
        while self._ring_waiting():
            pass
        if self._reaping.due():
            self._reap()
        if self._living.due():
            self._show_life()

    def _serve(self) -> None:
        with listening(self._sessions.kw["bind"], lifecycle.UNITS_CHANNEL) as bell:
            while not self._stop.is_set():
                self.step()
                bell.wait(self._settings.sweep_seconds)

    def _ring_waiting(self) -> bool:
        """Mark, commit, then publish: a doorbell is never rung for a row that may still vanish. True: there may be
        more."""
        settings = self._settings
        with self._sessions.begin() as session:
            marked = doorbells.dispatch(session, settings.ring_again_seconds, settings.chunks_rung_per_job)
        for number, bell in enumerate(marked):
            if not self._published(bell):
                with self._sessions.begin() as session:
                    doorbells.unring(session, [row.unit_id for row in marked[number:]], settings.sweep_seconds)
                return False
        return bool(marked)

    def _published(self, bell: doorbells.Ring) -> bool:
        try:
            self._ring(TASK_OF[bell.kind], bell.lane, str(bell.unit_id))
        except (BrokerError, redis.RedisError, OSError) as error:
            log.warning("broker_unreachable", error=type(error).__name__)
            return False
        return True

    def _reap(self) -> None:
        settings = self._settings
        with self._sessions.begin() as session:
            taken = lifecycle.reap(session, max_failures=settings.max_failures, stall=settings.stall_seconds)
        if taken:
            log.warning("reaped", units=taken)

    def _show_life(self) -> None:
        sign = processes.SignOfLife(self._name, processes.DISPATCHER, broker_reachable=self._broker_answers())
        with self._sessions.begin() as session:
            processes.alive(session, sign)
            processes.forget(session)

    def _broker_answers(self) -> bool:
        try:
            with redis.Redis.from_url(self._settings.redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def main() -> None:
    """Run one dispatcher until SIGTERM or SIGINT."""
    settings = Settings()
    logs.configure("dispatcher", settings.log_level)
    sessions = session_factory(settings.database_url, pool_size=2, application="renalq-dispatcher")
    dispatcher = Dispatcher(settings, sessions)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: dispatcher.stop())
    dispatcher.run()


if __name__ == "__main__":
    main()
