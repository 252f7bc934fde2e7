"""The only publisher to Celery. Run it with `python -m worker.dispatcher`, as often as availability asks for.

One dispatcher leads: it dispatches units in a fair order, and runs the services of `worker.dispatcher.maintenance` in
other threads. The others stand by, and one of them leads within two seconds of the leader's end. The leader listens for
NOTIFY and also polls, since a notification may be missed.
"""

import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress

import redis
import structlog
from sqlalchemy.orm import Session

from jobs import logs
from jobs.db import Sessions, session_factory
from jobs.events import job_events
from jobs.models.cards import REGISTRY_SYNC
from jobs.queue import dispatch, lifecycle, pace, processes
from jobs.queue.dispatch import QueueReader
from jobs.settings import Settings
from jobs.states import Lane
from worker.app import TASK_OF, publish_unit
from worker.dispatcher.leadership import PlanningConnection, planning_connection
from worker.dispatcher.maintenance import BROKER_ERRORS, TRACKING, Maintenance
from worker.dispatcher.scheduler import FairScheduler, Plan
from worker.dispatcher.services import DATABASE_ERRORS, Service, ServiceThread
from worker.dispatcher.webhook_sender import sending_webhooks

log = structlog.get_logger()

Publish = Callable[[str, Lane, str], None]
Begin = Callable[[], AbstractContextManager[Session]]
BATCHING_SECONDS = 0.02
"""While no worker is idle, notifications of so many seconds are answered by one snapshot."""
STANDBY_SECONDS = 1.0
"""How often a dispatcher that stands by tries to lead (s)."""
FROZEN_SECONDS = 20.0
"""A leader that has asked Postgres nothing for so long (s) is replaced. Its longest wait for Redis is half of this."""
STOP_SECONDS = 3.0
"""How long the end waits for each thread's running batch (s). What is cut off is rolled back."""
MEASURING_SECONDS = 1.0
"""How often the duration of units is measured (s)."""
SCHEDULED_SECONDS = 0.25
"""How often units that wait for a time are looked at, at most (s)."""


class Dispatcher:
    """One dispatcher. `step()` does everything once; `run()` leads or stands by until `stop()`."""

    def __init__(self, settings: Settings, sessions: Sessions, publish: Publish = publish_unit) -> None:
        self._settings, self._sessions, self._publish = settings, sessions, publish
        self._stop, self._leads = threading.Event(), threading.Event()
        self._unit_seconds: dict[Lane, float] = {}
        self._measured_at = self._enqueued_at = -math.inf
        self._scheduler = FairScheduler(settings.chunk_scans, settings.rung_ahead_seconds, settings.newcomer_seconds)
        self._name = f"dispatcher@{socket.gethostname()}/{os.getpid()}"
        maintenance = Maintenance(settings, sessions)
        heartbeat = Service("heartbeat", settings.process_seconds, self._report_alive)
        self._heartbeat = ServiceThread("heartbeat", [heartbeat])
        self._urgent = ServiceThread("urgent", maintenance.urgent(), self._leads.is_set)
        self._other = ServiceThread("maintenance", maintenance.other(), self._leads.is_set)

    def run(self) -> None:
        """Work until `stop()`. While Postgres is away it waits."""
        threads = self._heartbeat, self._urgent, self._other
        for thread in threads:
            thread.start()
        while not self._stop.is_set():
            try:
                with planning_connection(self._settings.database_url) as connection:
                    self._stand_by(connection)
                    self._lead(connection)
            except DATABASE_ERRORS as error:
                log.warning("database_lost", error=type(error).__name__)
                self._stop.wait(1)
        for thread in threads:
            thread.stop(STOP_SECONDS)
        with suppress(*DATABASE_ERRORS), self._sessions.begin() as session:  # otherwise the row grows old
            processes.deregister(session, self._name)

    def stop(self) -> None:
        """End `run()` after its current step."""
        self._stop.set()

    def step(self) -> None:
        """Dispatch waiting units, and run all services that are due, in this thread."""
        queue = QueueReader()
        self._prepare(self._sessions.begin, queue)
        self._dispatch_waiting(self._sessions.begin, queue)
        for thread in (self._heartbeat, self._urgent, self._other):
            thread.run_due()

    def _stand_by(self, connection: PlanningConnection) -> None:
        while not self._stop.is_set() and not connection.try_to_lead():
            if connection.end_frozen_leader(max(FROZEN_SECONDS, 5 * self._settings.sweep_seconds)):
                log.warning("frozen_leader_ended")
            else:
                self._stop.wait(STANDBY_SECONDS)

    def _lead(self, connection: PlanningConnection) -> None:
        if self._stop.is_set():
            return
        log.info("leading")
        notifications = connection.listen(job_events.UNITS_CHANNEL)
        queue = QueueReader()
        self._leads.set()
        try:
            with sending_webhooks(self._settings):
                while not self._stop.is_set():
                    read_more = self._dispatch_waiting(connection.begin, queue)
                    if self._prepare(connection.begin, queue) or read_more:
                        continue
                    if self._scheduler.is_busy:
                        self._stop.wait(BATCHING_SECONDS)
                    payloads = notifications.wait(self._settings.sweep_seconds)
                    queue.notice(payloads)
                    self._dispatch_new(connection.begin, queue)
                    if job_events.CANCELLATION in payloads:
                        self._urgent.hurry(job_events.CANCELLATION)
                    if REGISTRY_SYNC in payloads:
                        self._other.hurry(TRACKING)
        finally:
            self._leads.clear()

    def _dispatch_waiting(self, begin: Begin, queue: QueueReader) -> bool:
        """Mark, commit, then publish: no message is sent for a row that may still vanish. True: the next look will find
        more for the workers that are idle."""
        marked: set[uuid.UUID] = set()
        with begin() as session:
            plan = self._plan(session, queue)
            if plan.request_yield:
                dispatch.request_yield(session, [unit.unit_id for unit in plan.request_yield])
            if plan.reserve:
                dispatch.reserve(session, [unit.unit_id for unit in plan.reserve])
                queue.marked(unit.unit_id for unit in plan.reserve)
            if plan.dispatch:
                again = self._settings.ring_again_seconds
                marked = dispatch.dispatch(session, [unit.unit_id for unit in plan.dispatch], again)
                queue.marked(marked)
        published = self._publish_all(begin, [unit for unit in plan.dispatch if unit.unit_id in marked])
        return plan.read_more and bool(marked) and published

    def _dispatch_new(self, begin: Begin, queue: QueueReader) -> None:
        """Dispatch a unit that has just been queued, if the latest look left a worker of its lane idle: then nothing
        waits before it. Reading the queue first would take a quarter of an urgent scan's way to its worker."""
        if not self._scheduler.idle_lanes or queue.only_notice is None:
            return
        with begin() as session:
            unit = dispatch.dispatch_new(session, *queue.only_notice, self._scheduler.idle_lanes)
        if unit is not None:
            self._scheduler.dispatched(unit)
            queue.marked([unit.unit_id])
            self._publish_all(begin, [unit])

    def _publish_all(self, begin: Begin, units: Sequence[dispatch.WaitingUnit]) -> bool:
        """Publish the messages of dispatched units. False: Redis is away, and the rest is queued again."""
        left = list(units)
        while left and self._published(left[0]):
            left.pop(0)
        if left:
            with begin() as session:
                dispatch.release(session, [unit.unit_id for unit in left], self._settings.sweep_seconds)
        return not left

    def _prepare(self, begin: Begin, queue: QueueReader) -> bool:
        """What is done between two looks, so that no new unit waits for it: measure the duration of units, and queue
        those whose time has come. True: there were some."""
        due: list[str] = []
        with begin() as session:
            if time.monotonic() - self._measured_at >= MEASURING_SECONDS:
                self._unit_seconds, self._measured_at = pace.mean_unit_seconds(session), time.monotonic()
            if time.monotonic() - self._enqueued_at >= SCHEDULED_SECONDS:
                due, self._enqueued_at = lifecycle.enqueue_due(session), time.monotonic()
        queue.notice(due)
        return bool(due)

    def _plan(self, session: Session, queue: QueueReader) -> Plan:
        settings = self._settings
        alive, per_tenant = 3 * settings.process_seconds, self._scheduler.units_to_read(self._unit_seconds)
        found = queue.read(session, settings.ring_again_seconds, alive, per_tenant)
        return self._scheduler.plan(found, self._unit_seconds)

    def _published(self, unit: dispatch.WaitingUnit) -> bool:
        try:
            self._publish(TASK_OF[unit.kind], unit.lane, str(unit.unit_id))
        except BROKER_ERRORS as error:
            log.warning("broker_unreachable", error=type(error).__name__)
            return False
        return True

    def _report_alive(self) -> bool:
        beat = processes.Heartbeat(self._name, processes.DISPATCHER, broker_reachable=self._broker_answers())
        with self._sessions.begin() as session:
            processes.upsert(session, beat)
        return False

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
