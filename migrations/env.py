"""Runs migrations against RENALQ_DATABASE_URL, or against the connection that a test hands over."""

from alembic import context
from sqlalchemy import Connection

import jobs.tables  # noqa: F401  (fills Base.metadata)
from jobs import logs
from jobs.db import Base, make_engine
from jobs.settings import Settings


def run(connection: Connection) -> None:
    """Run the asked migrations, each in a transaction of its own: an index that is built CONCURRENTLY needs none."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    logs.hide_messages()  # an error of Postgres quotes values
    with make_engine(Settings().database_url, application="renalq-migrate").connect() as own:
        run(own)
