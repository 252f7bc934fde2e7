"""The API of a test. Its routes and schemas are built once per process; settings, database and store are the test's."""

from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask

from api import create_app
from api.http.body.spool import SPOOL_FOLDER
from api.http.change_listener import ChangeListener
from api.http.context import EXTENSION, Services
from api.http.traffic.rates import Rates
from api.http.traffic.request_counts import RequestCounts
from jobs.db import Sessions, session_factory
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from tests import builders

_idle: list[Flask] = []


@contextmanager
def application(settings: Settings, sessions: Sessions | None = None) -> Iterator[Flask]:
    """The application with these settings, for the length of the block. It has answered requests before: a test that
    adds a route builds one of its own by `create_app`.

    Args:
        sessions: what it reads and writes by; without them it connects to the settings' database, and disconnects.
    """
    app = _idle.pop() if _idle else create_app(settings)
    services = bind(app, settings, sessions or session_factory(settings.database_url, settings.db_pool))
    builders.store_weights(settings)
    try:
        yield app
    finally:
        services.listener.close()
        if sessions is None:
            services.sessions.kw["bind"].dispose()
        _idle.append(app)


def bind(app: Flask, settings: Settings, sessions: Sessions) -> Services:
    """Give an application the settings and the database of another. A test compares it with a new one."""
    listener = ChangeListener(sessions.kw["bind"], settings.wait_slots)
    blobs = BlobStore(settings.artifacts)
    services = Services(settings, sessions, blobs, listener, Rates(settings), RequestCounts(sessions))
    app.extensions[EXTENSION] = services
    app.config.update(MAX_CONTENT_LENGTH=settings.max_upload_bytes, SPOOL_FOLDER=settings.home / SPOOL_FOLDER)
    return services
