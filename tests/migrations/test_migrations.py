"""The schema's history runs up and down, and ends where `jobs/tables.py` stands."""

from alembic import command
from sqlalchemy import Connection, inspect, text

from jobs.db import Base, Sessions
from tests.conftest import alembic_config

OWNED_BY_NOBODY = {"processes"}


def test_models_and_migrations_agree(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        command.check(alembic_config(connection))


def test_downgrading_leaves_nothing_and_upgrading_restores_all(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        before = _objects(connection)
        command.downgrade(alembic_config(connection), "base")
        assert _objects(connection) == {"alembic_version"}
        command.upgrade(alembic_config(connection), "head")
        assert _objects(connection) == before


def test_every_row_that_belongs_to_somebody_names_its_tenant() -> None:
    without = {name for name, table in Base.metadata.tables.items() if "tenant_id" not in table.c}
    assert without == OWNED_BY_NOBODY


def test_every_constraint_is_named_by_the_convention(sessions: Sessions) -> None:
    with sessions.kw["bind"].connect() as connection:
        inspector = inspect(connection)
        for table in Base.metadata.tables:
            assert inspector.get_pk_constraint(table)["name"] == f"pk_{table}"
            for key in inspector.get_foreign_keys(table):
                assert str(key["name"]).startswith(f"fk_{table}_")
            for check in inspector.get_check_constraints(table):
                assert str(check["name"]).startswith(f"ck_{table}_")


def _objects(connection: Connection) -> set[str]:
    """Tables, sequences of ours and functions of the public schema."""
    tables = set(inspect(connection).get_table_names()) | set(inspect(connection).get_sequence_names())
    functions = connection.execute(text("SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"))
    return tables | {row.proname for row in functions}
