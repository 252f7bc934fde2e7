"""Engines, sessions, prepared statements, LISTEN, and the declarative base."""

import datetime as dt
import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, MetaData, create_engine, exc, func
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

Sessions = sessionmaker[Session]

# With a naming convention, migrations can drop constraints by name.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Base class of all tables."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)


POOL_SECONDS = 10
"""How long a thread waits for a connection that others use (s)."""
TIMEOUT_OPTIONS = "-c lock_timeout=20s -c idle_in_transaction_session_timeout=60s"


def make_engine(
    url: str,
    pool_size: int = 5,
    application: str = "renalq",
    pre_ping: bool = True,
    options: str = "",
    overflow: int = 0,
    **more: Any,
) -> Engine:
    """An engine for Postgres with psycopg2.

    Args:
        pool_size: connections that stay open once they were needed.
        overflow: further ones for as long as they are needed at the same time.
        pre_ping: test connections before use, since Postgres may restart. False for callers that retry by themselves.
        options: further options of Postgres, such as `-c name=x`.

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
        max_overflow=overflow,
        pool_pre_ping=pre_ping,
        pool_timeout=POOL_SECONDS,
        **more,
        hide_parameters=True,  # errors must not contain values of a row, such as the name of a file
        connect_args={
            "application_name": application,
            "connect_timeout": 5,
            # A peer that vanished is noticed in 30 s; the kernel's default is two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,  # the same for one that does not acknowledge data
            # A statement that is stuck on a lock must fail within the time of a lease; a process that is frozen in a
            # transaction must not keep its locks.
            "options": f"-c timezone=UTC {TIMEOUT_OPTIONS} {options}".rstrip(),
        },
    )


def session_factory(
    url: str,
    pool_size: int = 5,
    application: str = "renalq",
    pre_ping: bool = True,
    options: str = "",
    overflow: int = 0,
) -> Sessions:
    """A session factory. The caller owns each transaction: `with sessions.begin() as session`."""
    return sessionmaker(make_engine(url, pool_size, application, pre_ping, options, overflow), expire_on_commit=False)


# Prepared statements are planned once, perhaps while the tables are empty, when the planner would choose to read all of
# them.
ASYNC_COMMIT_OPTIONS = "-c synchronous_commit=off -c plan_cache_mode=force_generic_plan -c enable_seqscan=off"


def async_commit_engine(url: str, application: str) -> Engine:
    """An engine with one connection, on which each statement commits by itself, without waiting for the disk. A crash
    of Postgres may lose the last fraction of a second, so use it only where that does no harm."""
    return make_engine(url, 1, application, pre_ping=False, options=ASYNC_COMMIT_OPTIONS, isolation_level="AUTOCOMMIT")


class StandingSession:
    """One session of an `async_commit_engine`, for several threads in turn. It keeps its connection between two uses,
    which saves a sixth of a millisecond each; since each statement commits by itself, it holds no transaction."""

    def __init__(self, url: str, application: str) -> None:
        self._session = Session(async_commit_engine(url, application), expire_on_commit=False)
        self._lock = threading.Lock()

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """The session, for the length of the block. After an error a lost connection is replaced.

        Raises:
            sqlalchemy.exc.TimeoutError: another thread has held it for `POOL_SECONDS`.
        """
        if not self._lock.acquire(timeout=POOL_SECONDS):
            raise exc.TimeoutError("The connection is in use.")
        try:
            yield self._session
        except BaseException:
            self._session.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close its connection; it is opened again when needed."""
        with self._lock:
            self._session.close()
            self._session.get_bind().dispose()  # type: ignore[union-attr]


class PreparedStatement:
    """A statement that Postgres parses and plans once per connection, for statements that run for every unit.

    PREPARE outlives the transaction, even if it is rolled back; the names are kept in `connection.info`.

    Args:
        types: Postgres types of the parameters $1, $2, …, separated by commas.
    """

    def __init__(self, name: str, types: str, sql: str) -> None:
        self._name, self.sql = name, sql
        self._prepare = f"PREPARE {name} ({types}) AS {sql}".replace("%", "%%")
        self._execute = f"EXECUTE {name} ({', '.join(['%s'] * len(types.split(',')))})"

    def __call__(self, session: Session, *values: object) -> CursorResult[Any]:
        """Execute it in the session's transaction. Pass ids as text."""
        connection = session.connection()
        prepared: set[str] = connection.info.setdefault("prepared", set())
        if self._name not in prepared:
            connection.exec_driver_sql(self._prepare)
            prepared.add(self._name)
        return connection.exec_driver_sql(self._execute, values)


@contextmanager
def listening(engine: Engine, *channels: str) -> Iterator["Notifications"]:
    """LISTEN on the channels with a dedicated connection outside the pool."""
    raw = engine.raw_connection()
    driver = raw.driver_connection
    raw.detach()  # a listening connection must not return to the pool
    try:
        driver.set_session(autocommit=True)  # type: ignore[union-attr]
        cursor = raw.cursor()
        for channel in channels:
            cursor.execute(f'LISTEN "{channel}"')
        yield Notifications(driver)
    finally:
        raw.close()


class Notifications:
    """Notifications on one connection."""

    def __init__(self, connection) -> None:  # type: ignore[no-untyped-def]
        self._connection = connection

    def wait(self, seconds: float) -> list[str]:
        """Payloads received within `seconds`; empty if there were none.

        Raises:
            psycopg2.OperationalError: the connection is lost; open a new one.
        """
        if not self._connection.notifies:
            # Not select.select, which fails for descriptors above 1023.
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                selector.select(seconds)
        self._connection.poll()
        payloads = [notice.payload for notice in self._connection.notifies]
        self._connection.notifies.clear()
        return payloads


NOW = func.clock_timestamp()
"""All times come from Postgres' clock."""


def seconds(value: Any) -> ColumnElement[dt.timedelta]:
    """A Postgres interval in seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, value)
