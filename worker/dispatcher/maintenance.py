"""The leader's services: reap, end cancelled jobs, prune, expire, check drift, ask for the backfill of MLflow."""

import uuid
from collections.abc import Callable

import structlog
from kombu.exceptions import OperationalError as BrokerError
from psycopg2.errors import LockNotAvailable
from redis import RedisError
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.datasets import catalog
from jobs.db import Sessions
from jobs.events import deliveries, progress, webhooks
from jobs.events.job_events import CANCELLATION
from jobs.models import deletion as model_deletion
from jobs.models import drift
from jobs.queue import completion, processes, reaping, submission
from jobs.queue.lifecycle import RetryPolicy
from jobs.retention import services as retention
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from worker.app import publish_tracking
from worker.dispatcher.services import Service
from worker.tracking.backfill import is_behind

log = structlog.get_logger()

REAPED_AT_ONCE = 50
"""Units that are taken back in one batch, each in its own transaction."""
PRUNE_SECONDS = 600.0
CANCEL_SECONDS = 5.0
"""How often units of cancelled jobs are searched for, if no notification says that there are some (s)."""
PROGRESS_SECONDS = 1.0
"""How often is looked for progress that webhooks are to hear of (s)."""
BROKER_ERRORS = (BrokerError, RedisError, OSError)
TRACKING = "tracking"


class Maintenance:
    """The services of the leader."""

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self._settings, self._sessions = settings, sessions
        self._artifacts = BlobStore(settings.artifacts)
        self._checked: uuid.UUID | None = None  # the last champion whose drift was checked in this round
        self._drift_checked: uuid.UUID | None = None  # the last champion of the current round

    def urgent(self) -> list[Service]:
        """Services on which the progress of jobs depends. None of them asks a store or a broker."""
        return [
            Service("reap", min(5.0, self._settings.lease_seconds / 4), self._reap),
            Service(CANCELLATION, CANCEL_SECONDS, self._in_transaction(completion.cancel_batch)),
        ]

    def other(self) -> list[Service]:
        """All others. Some are slow."""
        settings = self._settings
        services = [
            Service("prune_keys", PRUNE_SECONDS, self._in_transaction(self._prune_keys)),
            Service("prune_deliveries", PRUNE_SECONDS, self._in_transaction(self._prune_deliveries)),
            Service("progress", PROGRESS_SECONDS, self._in_transaction(progress.emit_progress)),
            Service("prune_processes", PRUNE_SECONDS, self._in_transaction(_once(processes.prune))),
            Service("prune_loads", PRUNE_SECONDS, self._in_transaction(_once(submission.prune_loads))),
            Service("delete_models", PRUNE_SECONDS, self._in_transaction(self._delete_models)),
            Service("delete_datasets", PRUNE_SECONDS, self._in_transaction(self._delete_datasets)),
            Service("drift", settings.drift_seconds, self._check_drift),
            *(Service(*each) for each in retention.services(self._sessions, self._artifacts, settings)),
        ]
        if settings.mlflow_url:
            services.append(Service(TRACKING, settings.track_again_seconds, self._request_tracking))
        return services

    def _in_transaction(self, action: Callable[[Session], bool]) -> Callable[[], bool]:
        def run() -> bool:
            with self._sessions.begin() as session:
                return action(session)

        return run

    def _reap(self) -> bool:
        retry, units = RetryPolicy.of(self._settings), 0
        while units < REAPED_AT_ONCE and self._reap_one(retry):
            units += 1
        if units:
            log.warning("reaped", units=units)
        return units == REAPED_AT_ONCE

    def _reap_one(self, retry: RetryPolicy) -> bool:
        try:
            with self._sessions.begin() as session:
                return bool(reaping.reap(session, retry=retry, stall=self._settings.stall_seconds))
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            log.warning("reap_lock_timeout")  # the next interval tries again
            return False

    def _prune_keys(self, session: Session) -> bool:
        return idempotency.prune(session, self._settings.idempotency_hours) == idempotency.PRUNED_AT_ONCE

    def _prune_deliveries(self, session: Session) -> bool:
        more = deliveries.prune(session, self._settings.delivery_days) == deliveries.PRUNED_AT_ONCE
        webhooks.prune(session, self._settings.delivery_days)
        return more

    def _delete_models(self, session: Session) -> bool:
        days = self._settings.model_days
        return bool(days) and model_deletion.delete_old(session, days)

    def _delete_datasets(self, session: Session) -> bool:
        days = self._settings.dataset_days
        return bool(days) and catalog.delete_old(session, days)

    def _request_tracking(self) -> bool:
        with self._sessions.begin() as session:
            behind = is_behind(session)
        if behind:
            try:
                publish_tracking()
            except BROKER_ERRORS as error:
                log.warning("broker_unreachable", error=type(error).__name__)
        return False

    def _check_drift(self) -> bool:
        with self._sessions.begin() as session:
            self._checked = drift.check_drift(session, drift.DriftPolicy.of(self._settings), self._checked)
        return self._checked is not None


def _once(action: Callable[[Session], None]) -> Callable[[Session], bool]:
    """A service that does all of its work in one batch."""

    def run(session: Session) -> bool:
        action(session)
        return False

    return run
