"""The only publisher to Celery, and the janitor of the queue.

It dispatches units in a fair order, takes back expired leases, sends webhooks and prunes old rows. It listens for
NOTIFY and also polls, since a notification may be missed. Several dispatchers may run at once: each row is dispatched
by one of them (SKIP LOCKED). Run it with `python -m worker.dispatcher`.
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
from jobs.queue import checkpoints, dispatch, lifecycle, pace, processes, reaping, retention
from jobs.settings import Settings
from jobs.states import Lane
from jobs.storage.blobs import BlobStore
from worker.app import TASK_OF, publish_tracking, publish_unit
from worker.dispatcher.scheduler import FairScheduler, Plan
from worker.dispatcher.webhook_sender import sending_webhooks
from worker.tracking.backfill import is_behind

log = structlog.get_logger()

Publish = Callable[[str, Lane, str], None]
BATCHING_SECONDS = 0.02
"""While no worker is idle, notifications of so many seconds are answered by one snapshot."""
BROKER_ERRORS = (BrokerError, redis.RedisError, OSError)
DATABASE_ERRORS = (SQLAlchemyError, psycopg2.Error)


class Interval:
    """True at most once per interval."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        """Whether the interval is over. If so, the next one begins now."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True

    def shorten(self, seconds: float) -> None:
        """Be due in so many seconds at the latest."""
        self._next = min(self._next, time.monotonic() + seconds)


class Dispatcher:
    """One dispatcher. `step()` does everything once; `run()` repeats it."""

    def __init__(self, settings: Settings, sessions: Sessions, publish: Publish = publish_unit) -> None:
        self._settings, self._sessions, self._publish = settings, sessions, publish
        # If a crash of Postgres forgets that a unit was dispatched, one more message is sent: asynchronous commits.
        self._marks = async_commit_sessions(settings.database_url, "renalq-dispatch")
        self._artifacts = BlobStore(settings.artifacts)
        self._stop = threading.Event()
        self._reaping = Interval(min(5.0, settings.lease_seconds / 4))
        self._heartbeat = Interval(settings.process_seconds)
        self._measuring = Interval(1.0)
        self._pruning = Interval(600.0)
        self._expiring = Interval(600.0)
        self._tracking = Interval(settings.track_again_seconds)
        self._drift_check = Interval(settings.drift_seconds)
        self._unit_seconds: dict[Lane, float] = {}
        self._scheduler = FairScheduler(settings.chunk_scans, settings.rung_ahead_seconds, settings.newcomer_seconds)
        self._name = f"dispatcher@{socket.gethostname()}/{os.getpid()}"

    def run(self) -> None:
        """Work until `stop()`. While Postgres is away it waits."""
        with sending_webhooks(self._settings):
            while not self._stop.is_set():
                try:
                    self._serve()
                except DATABASE_ERRORS as error:
                    log.warning("database_lost", error=type(error).__name__)
                    self._stop.wait(1)
        with suppress(*DATABASE_ERRORS), self._sessions.begin() as session:  # otherwise the row grows old
            processes.deregister(session, self._name)

    def stop(self) -> None:
        """End `run()` after its current step."""
        self._stop.set()

    def step(self) -> None:
        """Dispatch waiting units; reap, prune, check drift and report as alive where that is due."""
        self._dispatch_waiting()
        if self._reaping.due():
            self._reap()
        if self._heartbeat.due():
            self._report_alive()
        if self._pruning.due():
            self._prune()
        if self._settings.results_days and self._expiring.due():
            self._expire()
        if self._settings.mlflow_url and self._tracking.due():
            self._request_tracking()
        if self._drift_check.due():
            self._check_drift()

    def _serve(self) -> None:
        with listening(self._sessions.kw["bind"], job_events.UNITS_CHANNEL) as notifications:
            while not self._stop.is_set():
                self.step()
                if self._scheduler.is_busy:
                    self._stop.wait(BATCHING_SECONDS)
                if REGISTRY_SYNC in notifications.wait(self._settings.sweep_seconds):
                    self._tracking.shorten(0)

    def _dispatch_waiting(self) -> None:
        """Mark, commit, then publish: no message is sent for a row that may still vanish."""
        marked: set[uuid.UUID] = set()
        with self._marks.begin() as session:
            plan = self._plan(session)
            if plan.request_yield:
                dispatch.request_yield(session, [unit.unit_id for unit in plan.request_yield])
            if plan.reserve:
                dispatch.reserve(session, [unit.unit_id for unit in plan.reserve])
            if plan.dispatch:
                again = self._settings.ring_again_seconds
                marked = dispatch.dispatch(session, [unit.unit_id for unit in plan.dispatch], again)
        left = [unit for unit in plan.dispatch if unit.unit_id in marked]
        while left and self._published(left[0]):
            left.pop(0)
        if left:
            with self._sessions.begin() as session:
                dispatch.release(session, [unit.unit_id for unit in left], self._settings.sweep_seconds)

    def _plan(self, session: Session) -> Plan:
        settings = self._settings
        if self._measuring.due():
            self._unit_seconds = pace.mean_unit_seconds(session)
        alive, per_tenant = 3 * settings.process_seconds, self._scheduler.units_to_read(self._unit_seconds)
        queue = dispatch.snapshot(session, settings.ring_again_seconds, settings.chunks_rung_per_job, alive, per_tenant)
        return self._scheduler.plan(queue, self._unit_seconds)

    def _published(self, unit: dispatch.WaitingUnit) -> bool:
        try:
            self._publish(TASK_OF[unit.kind], unit.lane, str(unit.unit_id))
        except BROKER_ERRORS as error:
            log.warning("broker_unreachable", error=type(error).__name__)
            return False
        return True

    def _reap(self) -> None:
        retry, units = lifecycle.RetryPolicy.of(self._settings), 0
        while self._reap_one(retry):
            units += 1
        if units:
            log.warning("reaped", units=units)

    def _reap_one(self, retry: lifecycle.RetryPolicy) -> bool:
        try:
            with self._sessions.begin() as session:
                return bool(reaping.reap(session, retry=retry, stall=self._settings.stall_seconds))
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            log.warning("reap_lock_timeout")  # the next interval tries again; dispatching goes on
            return False

    def _request_tracking(self) -> None:
        with self._sessions.begin() as session:
            behind = is_behind(session)
        if behind:
            try:
                publish_tracking()
            except BROKER_ERRORS as error:
                log.warning("broker_unreachable", error=type(error).__name__)

    def _prune(self) -> None:
        with self._sessions.begin() as session:
            idempotency.prune(session, self._settings.idempotency_hours)
            processes.prune(session)
            deliveries.prune(session, self._settings.delivery_days)
        try:
            with self._sessions.begin() as session:
                checkpoints.prune(session, self._artifacts)
        except DATABASE_ERRORS:
            raise
        except Exception as error:  # the store is away, or another dispatcher was first: the next interval tries again
            log.warning("checkpoints_not_pruned", error=type(error).__name__)

    def _expire(self) -> None:
        """Delete expired results in batches; units are dispatched in between."""
        with self._sessions.begin() as session:
            more = retention.expire(session, self._settings.results_days)
        if more:
            self._expiring.shorten(1.0)

    def _check_drift(self) -> None:
        with self._sessions.begin() as session:
            model_ids = drift.monitored_models(session)
        for model_id in model_ids:
            self._check_drift_of(model_id)

    def _check_drift_of(self, model_id: uuid.UUID) -> None:
        try:
            with self._sessions.begin() as session:
                drift.check_drift(session, model_id, drift.DriftPolicy.of(self._settings))
        except DATABASE_ERRORS:
            raise
        except Exception as error:  # an unreadable reference must stop neither other models nor dispatching
            log.error("drift_check_failed", model=str(model_id), error=type(error).__name__)

    def _report_alive(self) -> None:
        beat = processes.Heartbeat(self._name, processes.DISPATCHER, broker_reachable=self._broker_answers())
        with self._sessions.begin() as session:
            processes.upsert(session, beat)

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
