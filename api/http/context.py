"""What every view may use: settings, database, blob store, change listener; and the principal of the request."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from flask import current_app, g
from sqlalchemy.orm import Session

from api.http.change_listener import ChangeListener, Holder
from api.http.traffic.rates import Rates
from api.http.traffic.request_counts import RequestCounts
from jobs.db import Sessions
from jobs.keys import Principal
from jobs.queue import submission
from jobs.queue.submission import Quota
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore

EXTENSION = "renalq"


@dataclass(frozen=True)
class Services:
    """The long-lived objects of one API process."""

    settings: Settings
    sessions: Sessions
    blobs: BlobStore
    listener: ChangeListener
    rates: Rates
    requests: RequestCounts


def services() -> Services:
    """The services of the current application."""
    found: Services = current_app.extensions[EXTENSION]
    return found


def transaction() -> AbstractContextManager[Session]:
    """A session with one transaction, committed at the end of the block; then its connection is free again."""
    return services().sessions.begin()


def quota() -> Quota:
    """How much one tenant, and all tenants together, may have in the queue."""
    return Quota.of(services().settings)


def admit(scans: int = 1, batches: int = 0) -> None:
    """Check the quota before an upload is stored; `submit` checks it again.

    Raises:
        QuotaExceeded, QueueFull
    """
    with transaction() as session:
        submission.check_quota(session, tenant(), quota(), scans, batches)


def principal() -> Principal:
    """Whose key the request has. Public views have none."""
    found: Principal = g.principal
    return found


def tenant() -> str:
    """The tenant of the request's key."""
    return principal().tenant_id


def holder() -> Holder:
    """Whose slot a waiting request takes."""
    return Holder(tenant(), principal().key_id)
