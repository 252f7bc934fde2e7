"""The only publisher. It rings doorbells in a fair order, takes back lost leases, sends webhooks, forgets what is old.

It listens for NOTIFY, and sweeps behind that: a notification may be missed, a sweep is not. Several dispatchers may run
at once; each row is rung by one of them (SKIP LOCKED). Run it with `python -m worker.dispatcher`.
"""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import psycopg2
import redis
import structlog
from kombu.exceptions import OperationalError as BrokerError
from psycopg2.errors import LockNotAvailable
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from jobs import idempotency, logs
from jobs.db import Sessions, async_commit_sessions, listening, session_factory
from jobs.events import deliveries, job_events
from jobs.models import drift
from jobs.models.cards import REGISTRY_SYNC
from jobs.queue import checkpoints, dispatch, lifecycle, processes, retention
from jobs.settings import Settings
from jobs.states import Lane
from jobs.storage.blobs import BlobStore
from worker.app import TASK_OF, ring, ring_tracking
from worker.dispatcher.scheduler import Plan, Turns
from worker.dispatcher.webhook_sender import delivering
from worker.tracking.backfill import is_behind

log = structlog.get_logger()

Ring = Callable[[str, Lane, str], None]
GATHERING = 0.02
"""Seconds in which notifications gather while no worker is idle: one look then answers many of them."""
BROKER_AWAY = (BrokerError, redis.RedisError, OSError)
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

    def sooner(self, seconds: float) -> None:
        """Be due after so many seconds at the latest."""
        self._next = min(self._next, time.monotonic() + seconds)


class Dispatcher:
    """One dispatcher. `step()` is all that it does; `run()` repeats it."""

    def __init__(self, settings: Settings, sessions: Sessions, ring: Ring = ring) -> None:
        self._settings, self._sessions, self._ring = settings, sessions, ring
        # A mark that a crash of Postgres forgets costs one ring more.
        self._marks = async_commit_sessions(settings.database_url, "renalq-bells")
        self._artifacts = BlobStore(settings.artifacts)
        self._stop = threading.Event()
        self._reaping = Every(min(5.0, settings.lease_seconds / 4))
        self._living = Every(settings.process_seconds)
        self._pacing = Every(1.0)
        self._forgetting = Every(600.0)
        self._expiring = Every(600.0)
        self._tracking = Every(settings.track_again_seconds)
        self._drifting = Every(settings.drift_seconds)
        self._pace: dict[Lane, float] = {}
        self._turns = Turns(settings.chunk_scans, settings.rung_ahead_seconds, settings.newcomer_seconds)
        self._name = f"dispatcher@{socket.gethostname()}/{os.getpid()}"

    def run(self) -> None:
        """Work until `stop()`. Postgres going away is waited out."""
        with delivering(self._settings):
            while not self._stop.is_set():
                try:
                    self._serve()
                except LOST_DATABASE as error:
                    log.warning("database_lost", error=type(error).__name__)
                    self._stop.wait(1)
        with suppress(*LOST_DATABASE), self._sessions.begin() as session:  # else the row grows old by itself
            processes.deregister(session, self._name)

    def stop(self) -> None:
        """End `run()` after its step."""
        self._stop.set()

    def step(self) -> None:
        """Ring what waits; at its time reap what is lost, give a sign of life, and forget what is old."""
        self._ring_waiting()
        if self._reaping.due():
            self._reap()
        if self._living.due():
            self._show_life()
        if self._forgetting.due():
            self._forget()
        if self._settings.results_days and self._expiring.due():
            self._expire()
        if self._settings.mlflow_url and self._tracking.due():
            self._ring_tracking()
        if self._drifting.due():
            self._look_for_drift()

    def _serve(self) -> None:
        with listening(self._sessions.kw["bind"], job_events.UNITS_CHANNEL) as bell:
            while not self._stop.is_set():
                self.step()
                if self._turns.is_busy:
                    self._stop.wait(GATHERING)
                if REGISTRY_SYNC in bell.wait(self._settings.sweep_seconds):
                    self._tracking.sooner(0)

    def _ring_waiting(self) -> None:
        """Mark, commit, then publish: a doorbell is never rung for a row that may still vanish."""
        marked: set[uuid.UUID] = set()
        with self._marks.begin() as session:
            plan = self._plan(session)
            if plan.yields:
                dispatch.request_yield(session, [unit.unit_id for unit in plan.yields])
            if plan.promises:
                dispatch.reserve(session, [unit.unit_id for unit in plan.promises])
            if plan.rings:
                ring_again = self._settings.ring_again_seconds
                marked = dispatch.dispatch(session, [unit.unit_id for unit in plan.rings], ring_again)
        left = [unit for unit in plan.rings if unit.unit_id in marked]
        while left and self._published(left[0]):
            left.pop(0)
        if left:
            with self._sessions.begin() as session:
                dispatch.release(session, [unit.unit_id for unit in left], self._settings.sweep_seconds)

    def _plan(self, session: Session) -> Plan:
        settings = self._settings
        if self._pacing.due():
            self._pace = dispatch.pace(session)
        alive, ahead = 3 * settings.process_seconds, self._turns.look_ahead(self._pace)
        view = dispatch.snapshot(session, settings.ring_again_seconds, settings.chunks_rung_per_job, alive, ahead)
        return self._turns.plan(view, self._pace)

    def _published(self, bell: dispatch.WaitingUnit) -> bool:
        try:
            self._ring(TASK_OF[bell.kind], bell.lane, str(bell.unit_id))
        except BROKER_AWAY as error:
            log.warning("broker_unreachable", error=type(error).__name__)
            return False
        return True

    def _reap(self) -> None:
        retry, taken = lifecycle.RetryPolicy.of(self._settings), 0
        while self._reap_one(retry):
            taken += 1
        if taken:
            log.warning("reaped", units=taken)

    def _reap_one(self, retry: lifecycle.RetryPolicy) -> bool:
        try:
            with self._sessions.begin() as session:
                return bool(lifecycle.reap(session, retry=retry, stall=self._settings.stall_seconds))
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            log.warning("reaping_waits_for_a_lock")  # nobody else waits for it: ringing goes on
            return False

    def _ring_tracking(self) -> None:
        with self._sessions.begin() as session:
            behind = is_behind(session)
        if behind:
            try:
                ring_tracking()
            except BROKER_AWAY as error:
                log.warning("broker_unreachable", error=type(error).__name__)

    def _forget(self) -> None:
        with self._sessions.begin() as session:
            idempotency.prune(session, self._settings.idempotency_hours)
            processes.prune(session)
            deliveries.prune(session, self._settings.delivery_days)
        try:
            with self._sessions.begin() as session:
                checkpoints.prune(session, self._artifacts)
        except LOST_DATABASE:
            raise
        except Exception as error:  # a store that is away, or another dispatcher that was first: next time
            log.warning("checkpoints_not_pruned", error=type(error).__name__)

    def _expire(self) -> None:
        """A bite at a time, with ringing in between."""
        with self._sessions.begin() as session:
            more = retention.expire(session, self._settings.results_days)
        if more:
            self._expiring.sooner(1.0)

    def _look_for_drift(self) -> None:
        with self._sessions.begin() as session:
            watched = drift.monitored_models(session)
        for model_id in watched:
            self._look_at(model_id)

    def _look_at(self, model_id: uuid.UUID) -> None:
        try:
            with self._sessions.begin() as session:
                drift.check_drift(session, model_id, drift.DriftPolicy.of(self._settings))
        except LOST_DATABASE:
            raise
        except Exception as error:  # its reference cannot be read: all others are looked at, and ringing goes on
            log.error("drift_not_looked_for", model=str(model_id), error=type(error).__name__)

    def _show_life(self) -> None:
        sign = processes.Heartbeat(self._name, processes.DISPATCHER, broker_reachable=self._broker_answers())
        with self._sessions.begin() as session:
            processes.upsert(session, sign)

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
