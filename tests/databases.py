"""Databases for tests: migrated once, then used one after another by all tests of a process.

Emptying a used database takes a few milliseconds; a new one costs a copy on the disk, cold caches in Postgres, and in
SQLAlchemy the compilation of every statement.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Engine, make_url

from jobs.db import Sessions, make_engine, session_factory

ROOT = Path(__file__).resolve().parent.parent


class Database:
    """A migrated database, with engines that stay connected while it is used again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engines: dict[tuple[int, str], Sessions] = {}
        self._pids: set[int] = set()
        self._admin = psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(False))
        self._admin.autocommit = True
        self._schema = self._fetch(SCHEMA)

    def sessions(self, pool_size: int, application: str = "renalq") -> Sessions:
        """Sessions of this database, on connections that are kept for the next test."""
        key = (pool_size, application)
        if key not in self._engines:
            self._engines[key] = session_factory(self.url, pool_size, application)
            _note_connections(self._engines[key].kw["bind"], self._pids)
        return self._engines[key]

    def clear(self) -> None:
        """Delete all rows, and restart all counters. Others stay connected."""
        self._fetch(CLEAR)

    def restore(self) -> bool:
        """Clear it and end the connections of others. False: a test has changed its tables, so that no other test can
        use it."""
        for factory in self._engines.values():
            if factory.kw["bind"].pool.checkedout():  # a test has kept a session: it may hold locks
                factory.kw["bind"].dispose()
        try:
            self._fetch(END_OTHERS, [self._admin.get_backend_pid(), *self._pids])
            if self._fetch(SCHEMA) != self._schema:
                return False
            self.clear()
        except psycopg2.Error:
            return False
        return True

    def close(self) -> None:
        """End its connections."""
        for factory in self._engines.values():
            factory.kw["bind"].dispose()
        self._admin.close()

    def _fetch(self, statement: str, *values: Any) -> Any:
        with self._admin.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else None


def _note_connections(engine: Engine, pids: set[int]) -> None:
    """Keep `pids` the set of server processes of the engine's pool; a detached connection is not of the pool."""
    event.listen(engine, "connect", lambda connection, _: pids.add(connection.get_backend_pid()))
    for name in ("close", "detach", "close_detached"):
        event.listen(engine, name, lambda connection, *_: pids.discard(connection.info.backend_pid))


# Every table, column, index, constraint, function and trigger, whether it is switched on or not.
SCHEMA = """
SELECT md5(string_agg(thing, ' ' ORDER BY thing)) FROM (
    SELECT relname || relkind::text FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT attrelid::text || attname || atttypid || attnotnull::text FROM pg_attribute
        JOIN pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL SELECT tgrelid::text || tgname || tgenabled::text FROM pg_trigger
    UNION ALL SELECT conrelid::text || conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT proname || md5(prosrc) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
) AS things (thing)
"""
END_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> ALL (%s)
"""
CLEAR = """
DO $$
DECLARE
    name text;
    filled boolean;
    found text[] := '{}';
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version' LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %I)', name) INTO filled;
        IF filled THEN found := found || quote_ident(name); END IF;
    END LOOP;
    IF found <> '{}' THEN EXECUTE 'TRUNCATE ' || array_to_string(found, ', ') || ' CASCADE'; END IF;
    FOR name IN SELECT sequencename FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL LOOP
        EXECUTE format('ALTER SEQUENCE %I RESTART', name);
    END LOOP;
END $$
"""


class Databases:
    """The databases of one test process on one server."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._template = ""
        self._free: list[Database] = []

    @contextmanager
    def clone(self) -> Iterator[str]:
        """The URL of a database that nobody has used and nobody else will."""
        url = self._made()
        yield url
        self._drop(url)

    @contextmanager
    def borrow(self) -> Iterator[Database]:
        """A database with all tables and no rows, which others have used or will."""
        database = self._free.pop() if self._free else Database(self._made())
        yield database
        if database.restore():
            self._free.append(database)
        else:
            database.close()
            self._drop(database.url)

    def close(self) -> None:
        """Drop all of them."""
        for database in self._free:
            database.close()
            self._drop(database.url)
        if self._template:
            self._drop(_named(self._server, self._template))

    def _made(self) -> str:
        self._template = self._template or self._migrated()
        name = f"test_{uuid.uuid4().hex[:12]}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._template}"')
        return _named(self._server, name)

    def _migrated(self) -> str:
        name = f"template_{uuid.uuid4().hex[:8]}"
        self._execute(f'CREATE DATABASE "{name}"')
        engine = make_engine(_named(self._server, name))
        with engine.connect() as connection:
            command.upgrade(alembic_config(connection), "head")
        engine.dispose()
        return name

    def _drop(self, url: str) -> None:
        self._execute(f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        engine = create_engine(self._server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


def alembic_config(connection: object = None) -> Config:
    """Alembic's configuration, on a given connection."""
    config = Config(ROOT / "alembic.ini")
    config.attributes["connection"] = connection
    return config


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)
