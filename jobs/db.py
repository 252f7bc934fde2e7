"""Engine, sessions, and the declarative base with the naming convention of constraints."""

import datetime as dt
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, MetaData, create_engine, func
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

Sessions = sessionmaker[Session]

# Named constraints can be dropped by a migration on every database alike; unnamed ones only by guessing.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Every table's base."""

    metadata = MetaData(naming_convention=NAMING)


PATIENCE = "-c lock_timeout=20s -c idle_in_transaction_session_timeout=60s"


def make_engine(
    url: str, pool_size: int = 5, application: str = "renalq", pre_ping: bool = True, options: str = "", **more: Any
) -> Engine:
    """An engine for Postgres by psycopg2. Connections are tested before use, as Postgres may restart under us; not
    with `pre_ping=False`, for those who try again by themselves. `options`: more of Postgres' own, such as `-c name=x`.

    Raises:
        ValueError: the URL names another database or driver.
    """
    if make_url(url).drivername != "postgresql+psycopg2":
        raise ValueError(
            "RENALQ_DATABASE_URL must begin with postgresql+psycopg2:// (SQLAlchemy 2.1 needs the driver named)"
        )
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=pre_ping,
        pool_timeout=10,
        **more,
        hide_parameters=True,  # an error's text must not carry what was in a row: it may be a file's name
        connect_args={
            "application_name": application,
            "connect_timeout": 5,
            # A peer that vanished without a word is noticed in 30 s, not in the kernel's two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,  # the same for one that takes nothing we send
            # No statement waits for a lock longer than a lease lives: a stuck one must fail, not hang. And nobody keeps
            # one who is frozen in the middle of a transaction.
            "options": f"-c timezone=UTC {PATIENCE} {options}".rstrip(),
        },
    )


def session_factory(
    url: str, pool_size: int = 5, application: str = "renalq", pre_ping: bool = True, options: str = ""
) -> Sessions:
    """A factory of sessions. The caller owns each transaction: `with sessions.begin() as session`."""
    return sessionmaker(make_engine(url, pool_size, application, pre_ping, options), expire_on_commit=False)


def forgetful_sessions(url: str, application: str) -> Sessions:
    """Sessions for verbs of one statement whose loss does no harm: each is committed at once, and its commit does not
    wait for the disk. Should Postgres crash, the last fraction of a second of them may be forgotten."""
    engine = make_engine(
        url, 1, application, pre_ping=False, options="-c synchronous_commit=off", isolation_level="AUTOCOMMIT"
    )
    return sessionmaker(engine, expire_on_commit=False)


class Prepared:
    """A statement that Postgres parses and plans once a connection, and that takes one trip: for what is done for
    every unit. Types are Postgres' names of its parameters $1, $2 …

    A PREPARE outlives the transaction, even one that is rolled back; what is prepared is noted beside the connection.
    """

    def __init__(self, name: str, types: str, sql: str) -> None:
        self._name, self.sql = name, sql
        self._prepare = f"PREPARE {name} ({types}) AS {sql}".replace("%", "%%")
        self._execute = f"EXECUTE {name} ({', '.join(['%s'] * len(types.split(',')))})"

    def __call__(self, session: Session, *values: object) -> CursorResult[Any]:
        """Execute it in the session's transaction. Ids are given as text."""
        connection = session.connection()
        known: set[str] = connection.info.setdefault("prepared", set())
        if self._name not in known:
            connection.exec_driver_sql(self._prepare)
            known.add(self._name)
        return connection.exec_driver_sql(self._execute, values)


@contextmanager
def listening(engine: Engine, *channels: str) -> Iterator["Notifications"]:
    """LISTEN on the channels with a connection of its own, outside the pool."""
    raw = engine.raw_connection()
    driver = raw.driver_connection
    raw.detach()  # ours alone from here on: a listening connection must not return to the pool
    try:
        driver.set_session(autocommit=True)  # type: ignore[union-attr]
        cursor = raw.cursor()
        for channel in channels:
            cursor.execute(f'LISTEN "{channel}"')
        yield Notifications(driver)
    finally:
        raw.close()


class Notifications:
    """What NOTIFY brings to one connection."""

    def __init__(self, connection) -> None:  # type: ignore[no-untyped-def]
        self._connection = connection

    def wait(self, seconds: float) -> list[str]:
        """Payloads that came within `seconds`; an empty list when none did.

        Raises:
            psycopg2.OperationalError: the connection is gone; open another.
        """
        if not self._connection.notifies:
            select.select([self._connection], [], [], seconds)
        self._connection.poll()
        payloads = [notice.payload for notice in self._connection.notifies]
        self._connection.notifies.clear()
        return payloads


NOW = func.clock_timestamp()
"""Only Postgres' clock decides."""


def seconds(value: Any) -> ColumnElement[dt.timedelta]:
    """A Postgres interval of so many seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, value)
