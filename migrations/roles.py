"""Who may do what in Postgres: an owner for migrations, a role for the application, and one for MLflow.

    python -m migrations.roles

It may run again at any time: it also takes over databases of releases that had one superuser for everything. None of
the three is a superuser, so none reads the server's files or runs its programs; the application's role changes rows and
no table; each role connects to its own database only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2 import extensions, sql
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import URL, make_url

Cursor = extensions.cursor


class RoleSettings(BaseSettings):
    """SQLAlchemy URLs; roles, passwords and names of databases are taken from them."""

    model_config = SettingsConfigDict(env_prefix="RENALQ_", extra="ignore")

    superuser_url: str
    owner_url: str
    database_url: str
    """The application's."""
    mlflow_store: str


def make_roles(settings: RoleSettings) -> None:
    """Make databases and roles, or set them right.

    Raises:
        psycopg2.Error: the server is away, or `superuser_url` is no superuser's.
    """
    superuser = make_url(settings.superuser_url)
    owner, application, mlflow = map(make_url, (settings.owner_url, settings.database_url, settings.mlflow_store))
    with _connected(superuser, "postgres") as cursor:
        for login in (owner, application, mlflow):
            _make_role(cursor, login)
        for login in (owner, mlflow):
            _make_database(cursor, login)
        _execute(cursor, "REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")
        _execute(cursor, "GRANT CONNECT ON DATABASE {} TO {}", owner.database, application.username)
    for login in (owner, mlflow):
        with _connected(superuser, str(login.database)) as cursor:
            _give_everything(cursor, str(login.username))
    with _connected(superuser, str(owner.database)) as cursor:
        for right in RIGHTS:
            _execute(cursor, f"GRANT {right} IN SCHEMA public TO {{}}", application.username)
            future = right.replace(" ON ALL ", " ON ")
            grant = f"ALTER DEFAULT PRIVILEGES FOR ROLE {{}} IN SCHEMA public GRANT {future} TO {{}}"
            _execute(cursor, grant, owner.username, application.username)
        _execute(cursor, "GRANT USAGE ON SCHEMA public TO {}", application.username)


RIGHTS = ("SELECT, INSERT, UPDATE, DELETE ON ALL TABLES", "USAGE, SELECT ON ALL SEQUENCES")
"""The application's, on what there is and on what migrations will make."""


@contextmanager
def _connected(url: URL, database: str) -> Iterator[Cursor]:
    login = {"host": url.host, "port": url.port or 5432, "user": url.username, "password": url.password}
    connection = psycopg2.connect(**login, dbname=database, connect_timeout=5, options="-c lock_timeout=20s")
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def _execute(cursor: Cursor, statement: str, *names: str | None) -> None:
    cursor.execute(sql.SQL(statement).format(*(sql.Identifier(str(name)) for name in names)))


def _make_role(cursor: Cursor, login: URL) -> None:
    cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", (login.username,))
    if not cursor.rowcount:
        _execute(cursor, "CREATE ROLE {}", login.username)
    plain = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
    # The password is sent hashed: statements may be logged, and others' are shown in pg_stat_activity.
    hashed = extensions.encrypt_password(str(login.password), str(login.username), cursor.connection, "scram-sha-256")
    cursor.execute(sql.SQL("ALTER ROLE {} {} PASSWORD {}").format(
        sql.Identifier(str(login.username)), sql.SQL(plain), sql.Literal(hashed)
    ))  # fmt: skip


def _make_database(cursor: Cursor, login: URL) -> None:
    cursor.execute("SELECT FROM pg_database WHERE datname = %s", (login.database,))
    if not cursor.rowcount:
        _execute(cursor, "CREATE DATABASE {}", login.database)
    _execute(cursor, "ALTER DATABASE {} OWNER TO {}", login.database, login.username)
    _execute(cursor, "REVOKE ALL ON DATABASE {} FROM PUBLIC", login.database)


def _give_everything(cursor: Cursor, owner: str) -> None:
    """Give the owner the schema and all that others own in it, a table with its indexes and the sequences of its
    columns. (REASSIGN OWNED refuses what the first superuser owns.)"""
    _execute(cursor, "ALTER SCHEMA public OWNER TO {}", owner)
    _execute(cursor, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    cursor.execute(OTHERS, {"owner": owner})
    for kind, name in cursor.fetchall():
        cursor.execute(sql.SQL(f"ALTER {kind} {name} OWNER TO {{}}").format(sql.Identifier(owner)))


# Names come quoted out of casts to regclass, regprocedure and regtype.
OTHERS = """
WITH independent AS (
    SELECT oid, relkind, relowner FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')
    AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid
                    AND deptype IN ('a', 'i', 'e'))
)
SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END,
       oid::regclass::text
    FROM independent WHERE relowner <> %(owner)s::regrole
UNION ALL SELECT 'ROUTINE', oid::regprocedure::text FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace AND proowner <> %(owner)s::regrole
    AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
UNION ALL SELECT 'TYPE', oid::regtype::text FROM pg_type
    WHERE typnamespace = 'public'::regnamespace AND typtype IN ('d', 'e') AND typowner <> %(owner)s::regrole
    AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_type.oid AND deptype = 'e')
"""


if __name__ == "__main__":
    make_roles(RoleSettings())
