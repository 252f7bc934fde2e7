"""Roles on a real server: made once, set right again, and given what an older release left to its superuser."""

import uuid
from collections.abc import Iterator
from contextlib import closing

import psycopg2
import pytest
from psycopg2 import errors, sql
from sqlalchemy import URL, make_url

from migrations.roles import RoleSettings, make_roles
from tests.databases import Databases, alembic_config

OWNERS = """
SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace
UNION SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'public'
"""


@pytest.fixture
def old(databases: Databases) -> Iterator[RoleSettings]:
    """The database of a release that had one superuser for everything; the URLs of roles that are not there yet."""
    name = uuid.uuid4().hex[:8]
    with databases.clone() as url:

        def role(of: str, database: str | None) -> str:
            given = make_url(url).set(username=f"{of}_{name}", password=f"{of} #1%", database=database)
            return given.render_as_string(hide_password=False)

        database = make_url(url).database
        yield RoleSettings(
            superuser_url=url,
            owner_url=role("owner", database),
            database_url=role("app", database),
            mlflow_store=role("mlflow", f"mlflow_{name}"),
        )
        with _connected(make_url(url), "postgres") as cursor:
            for statement in (
                "DROP DATABASE IF EXISTS mlflow_{0}",
                "DROP DATABASE {1} WITH (FORCE)",
                "CREATE DATABASE {1}",
            ):
                cursor.execute(sql.SQL(statement.format(name, '"' + str(database) + '"')))
            for each in ("owner", "app", "mlflow"):
                cursor.execute(f"DROP ROLE IF EXISTS {each}_{name}")


class _connected(closing[psycopg2.extensions.connection]):  # noqa: N801
    """A cursor that commits each statement."""

    def __init__(self, url: URL, database: str | None = None) -> None:
        login = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
        super().__init__(psycopg2.connect(**login, dbname=database or url.database))

    def __enter__(self) -> psycopg2.extensions.cursor:  # type: ignore[override]
        self.thing.autocommit = True
        return self.thing.cursor()


def test_all_of_an_older_release_goes_to_the_owner_and_rows_to_the_application(old: RoleSettings) -> None:
    make_roles(old)
    with _connected(make_url(old.superuser_url)) as cursor:
        cursor.execute(OWNERS)
        assert cursor.fetchall() == [(make_url(old.owner_url).username,)]
    with _connected(make_url(old.owner_url)) as cursor:
        cursor.execute(
            "ALTER TABLE jobs ADD new int; CREATE TABLE later (id int GENERATED ALWAYS AS IDENTITY, n serial)"
        )
    with _connected(make_url(old.database_url)) as cursor:
        cursor.execute("INSERT INTO later DEFAULT VALUES; SELECT nextval('unit_fence_seq'); SELECT new FROM jobs")
        with pytest.raises(errors.InsufficientPrivilege):
            cursor.execute("ALTER TABLE later ADD new int")


def test_roles_that_were_given_more_are_set_right_and_passwords_follow(old: RoleSettings) -> None:
    make_roles(old)
    name = make_url(old.database_url).username
    with _connected(make_url(old.superuser_url)) as cursor:
        cursor.execute(f"ALTER ROLE {name} SUPERUSER CREATEDB PASSWORD 'another'")
    make_roles(old)
    with _connected(make_url(old.database_url)) as cursor:
        cursor.execute("SELECT rolsuper OR rolcreatedb FROM pg_roles WHERE rolname = current_user")
        assert cursor.fetchone() == (False,)


def test_mlflow_has_a_database_and_no_other(old: RoleSettings) -> None:
    make_roles(old)
    store = make_url(old.mlflow_store)
    with _connected(store) as cursor:
        cursor.execute("CREATE TABLE runs (id int)")
    with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
        _connected(store, make_url(old.owner_url).database)


def test_migrations_run_as_the_owner(old: RoleSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import command

    make_roles(old)
    monkeypatch.setenv("RENALQ_DATABASE_URL", old.owner_url)
    command.downgrade(alembic_config(), "-1")
    command.upgrade(alembic_config(), "head")
