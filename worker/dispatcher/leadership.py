"""Which dispatcher leads: the one that holds an advisory lock of the database, on the connection that it plans with.

Postgres releases the lock when that connection ends, so no clock and no row is needed, and a dispatcher that has lost
its connection can plan nothing. The connection must be a session of its own: behind PgBouncer, use session pooling.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from jobs.db import Notifications, async_commit_engine

LEADER_LOCK = 5_931_087_415
"""Number of the advisory lock: one leader in each database."""

TRY_TO_LEAD = text("SELECT pg_try_advisory_lock(:lock)")
# A lock's 64-bit number is stored in two halves. The leader's backend runs a statement in every round, and
# `state_change` is the time of the latest one. Ending one's own role's backend needs no superuser.
END_FROZEN_LEADER = text("""
SELECT pg_terminate_backend(activity.pid) FROM pg_locks JOIN pg_stat_activity AS activity USING (pid)
WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND classid::bigint = :lock / 4294967296 AND objid::bigint = :lock % 4294967296
    AND state_change < clock_timestamp() - make_interval(secs => :seconds)
""")


class PlanningConnection:
    """The one connection on which a dispatcher stands by, leads, listens and plans. Each statement commits by itself,
    without waiting for the disk: if a crash of Postgres forgets that a unit was dispatched, one more message is sent.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._session = Session(connection, expire_on_commit=False)

    def begin(self) -> AbstractContextManager[Session]:
        """The session of all statements. It stays open, which saves each look a quarter of a millisecond; since each
        statement commits by itself, it holds no transaction."""
        return nullcontext(self._session)

    def try_to_lead(self) -> bool:
        """Take the lock. False: another dispatcher leads."""
        return bool(self._connection.scalar(TRY_TO_LEAD, {"lock": LEADER_LOCK}))

    def end_frozen_leader(self, seconds: float) -> bool:
        """End the connection of a leader that has run no statement for so long: its process is stopped, or its machine
        is gone. If it wakes up, it stands by like any other."""
        return bool(self._connection.scalar(END_FROZEN_LEADER, {"lock": LEADER_LOCK, "seconds": seconds}))

    def listen(self, channel: str) -> Notifications:
        """Notifications of the channel, on this connection."""
        self._connection.exec_driver_sql(f'LISTEN "{channel}"')
        return Notifications(self._connection.connection.driver_connection)


@contextmanager
def planning_connection(url: str) -> Iterator[PlanningConnection]:
    """A new connection, which ends with the block, and the leadership with it."""
    engine = async_commit_engine(url, "renalq-dispatch")
    try:
        with engine.connect() as connection:
            yield PlanningConnection(connection)
    finally:
        engine.dispose()
