"""What a worker's process holds for as long as it lives: settings, database sessions, the store of blobs."""

from dataclasses import dataclass
from functools import cache

from jobs.db import Sessions, async_commit_sessions, session_factory
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore

PROMPT = "-c idle_in_transaction_session_timeout=10s"
"""A worker's transactions are a few statements. One that is frozen in the middle of one loses its locks after this."""


@dataclass(frozen=True)
class Resources:
    """Opened once a process."""

    settings: Settings
    sessions: Sessions
    claims: Sessions  # a claim that a crash of Postgres forgets was never made: its holder can write nothing
    beats: Sessions  # a connection of the heartbeat's own: a busy pool must never cost the lease. No transaction stays
    # open between two trips: a worker that is frozen there would keep the unit's lock from whoever takes it back
    artifacts: BlobStore


def open_resources(settings: Settings) -> Resources:
    """Open them from the given settings. Lost connections are noticed when they are used: what fails is repeated."""
    return Resources(
        settings=settings,
        sessions=session_factory(
            settings.database_url, pool_size=3, application="renalq-worker", pre_ping=False, options=PROMPT
        ),
        claims=async_commit_sessions(settings.database_url, "renalq-claim"),
        beats=async_commit_sessions(settings.database_url, "renalq-beat"),
        artifacts=BlobStore(settings.artifacts),
    )


@cache
def resources() -> Resources:
    """This process's resources, from the environment."""
    return open_resources(Settings())
