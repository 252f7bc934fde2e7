"""Databases with our tables, and what Postgres says of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import Engine, make_url

from cli.stack.postgres import create_database

TABLES = """
SELECT relname AS name, n_tup_upd AS updated, n_tup_hot_upd AS hot, n_dead_tup AS dead,
    pg_total_relation_size(relid) AS bytes, autovacuum_count AS autovacuums
FROM pg_stat_user_tables WHERE relname = ANY (:tables)
"""
PAGES = "SELECT sum(hits) + sum(reads) FROM pg_stat_get_backend_io(pg_backend_pid()) WHERE object = 'relation'"


def migrated(url: str, name: str) -> str:
    """A new database with the working directory's tables on the server: its URL."""
    engine = create_engine(_database(url, "postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {_migrated_once(url)}"))
    engine.dispose()
    return _database(url, name)


@cache
def _migrated_once(url: str) -> str:
    """The template of all databases of this server: migrations take seconds."""
    name = "bench_template"
    create_database(url, name)
    environ = {**os.environ, "RENALQ_DATABASE_URL": _database(url, name)}
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], cwd=Path.cwd(), env=environ, check=True)
    return name


def _database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


class Statements:
    """The statements that an engine executes within a `with` block, with their parameters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.asked: list[tuple[str, Any]] = []

    def __enter__(self) -> Statements:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.lstrip().upper().startswith(("SELECT", "WITH", "UPDATE", "INSERT", "EXECUTE")):
            self.asked.append((statement, parameters))

    def plans(self, connection: Connection, how: str = "") -> list[str]:
        """EXPLAIN each of them, on a connection on which those that are prepared have been prepared."""
        lines: list[str] = []
        for statement, parameters in self.asked:
            lines += connection.exec_driver_sql(f"EXPLAIN {how} {statement}", parameters).scalars()
        return lines


class Backend:
    """What the one connection of an engine has used up so far, and this thread with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        with engine.connect() as connection:
            pid = connection.scalar(text("SELECT pg_backend_pid()"))
        self._schedstat = Path(f"/proc/{pid}/schedstat")

    def cpu_ms(self) -> float:
        """Processor time of the server's process and of this thread. Whoever else is at work on the machine adds
        nothing to it; nor does waiting for the disk."""
        return (int(self._schedstat.read_text().split()[0]) + time.thread_time_ns()) / 1e6

    def pages(self) -> int:
        """Pages touched. A call adds some itself."""
        with self._engine.connect() as connection:
            connection.execute(text("SELECT pg_stat_force_next_flush()"))
            connection.commit()
            return int(connection.scalar(text(PAGES)) or 0)


def written(connection: Connection, *tables: str) -> dict[str, dict[str, int]]:
    """Rows that were updated so far, those of them that were HOT, and dead ones, by table.

    Counts of other connections may be a second late; those of this one are up to date.
    """
    connection.execute(text("SELECT pg_stat_force_next_flush()"))
    connection.commit()
    rows = connection.execute(text(TABLES), {"tables": list(tables)}).mappings().all()
    connection.commit()
    return {row["name"]: {key: int(value) for key, value in row.items() if key != "name"} for row in rows}
