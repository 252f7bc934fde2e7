"""What a worker process keeps open: settings, database sessions, the blob store."""

from dataclasses import dataclass
from functools import cache

from jobs.db import Sessions, StandingSession, session_factory
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore

WORKER_TIMEOUT_OPTIONS = "-c idle_in_transaction_session_timeout=10s"
"""A worker's transactions are a few statements. A worker that freezes within one loses its locks after this."""


@dataclass(frozen=True)
class Resources:
    """Opened once per process. A process keeps two connections: one for its work, one for claims and heartbeats."""

    settings: Settings
    sessions: Sessions
    """Simultaneous transactions, such as those of a training's MLflow thread, take further connections for a moment."""
    autocommit: StandingSession
    """The connection of claims and heartbeats: a busy body must not cost the lease. Each statement commits by itself,
    in one round trip: a worker that freezes between two must not hold the unit's lock. None waits for the disk: who has
    lost a claim in a crash of Postgres can write nothing. A worker's parent process uses no other connection."""
    artifacts: BlobStore


def open_resources(settings: Settings) -> Resources:
    """Open them from the settings. Without a pre-ping: calls that fail on a lost connection are repeated."""
    sessions = session_factory(
        settings.database_url,
        pool_size=1,
        overflow=3,
        application="renalq-worker",
        pre_ping=False,
        options=WORKER_TIMEOUT_OPTIONS,
    )
    return Resources(
        settings=settings,
        sessions=sessions,
        autocommit=StandingSession(settings.database_url, "renalq-beat"),
        artifacts=BlobStore(settings.artifacts),
    )


@cache
def resources() -> Resources:
    """The resources of this process, from the environment."""
    return open_resources(Settings())
