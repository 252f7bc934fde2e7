"""What a view reaches for: the settings, the database, the store, and the bell of changes; and who asks."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from flask import current_app, g
from sqlalchemy.orm import Session

from api.http.change_listener import Changes
from jobs.db import Sessions
from jobs.keys import Principal
from jobs.queue import submission
from jobs.queue.submission import Quota
from jobs.settings import Settings
from jobs.storage.blobs import Artifacts

EXTENSION = "renalq"


@dataclass(frozen=True)
class Services:
    """Everything that one API process holds on to."""

    settings: Settings
    sessions: Sessions
    artifacts: Artifacts
    changes: Changes


def services() -> Services:
    """The services of the application that answers now."""
    found: Services = current_app.extensions[EXTENSION]
    return found


def transaction() -> AbstractContextManager[Session]:
    """A session with one transaction, committed at the end of the block; nothing is held after it."""
    return services().sessions.begin()


def quota() -> Quota:
    """What a tenant, and all together, may have in the queue."""
    return Quota.of(services().settings)


def admit(scans: int = 1, batches: int = 0) -> None:
    """Refuse early what the queue has no room for: before an upload is stored.

    Raises:
        QuotaExceeded, QueueFull
    """
    with transaction() as session:
        submission.check_quota(session, tenant(), quota(), scans, batches)


def principal() -> Principal:
    """Who asks. Only views that are not public may ask this."""
    found: Principal = g.principal
    return found


def tenant() -> str:
    """The tenant of whoever asks."""
    return principal().tenant_id
