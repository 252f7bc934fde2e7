"""Procrastinate: a queue in Postgres alone, with LISTEN/NOTIFY."""

import os

from procrastinate import App, PsycopgConnector
from sqlalchemy.engine import make_url

from bench.peers.empty import say_now

url = make_url(os.environ["RENALQ_DATABASE_URL"]).set(drivername="postgresql")
app = App(connector=PsycopgConnector(conninfo=url.render_as_string(hide_password=False)))


@app.task(name="empty")
async def empty() -> None:
    """Nothing but its first line."""
    say_now()
