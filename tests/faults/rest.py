"""The real API of a stack, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flask import Flask
from flask.testing import FlaskClient

from jobs import keys
from tests.applications import application
from tests.builders import TENANT
from tests.processes import Stack

SCOPES = ("jobs:read", "jobs:write", "models:write", "admin")


@dataclass(frozen=True)
class Rest:
    """Makes clients whose every request carries a key."""

    app: Flask
    processes: Stack

    def client(self, tenant_id: str = TENANT) -> FlaskClient:
        """A client with a new key of this tenant. One client is for one thread."""
        with self.processes.sessions.begin() as session:
            secret = keys.create(session, "test", SCOPES, tenant_id).secret
        return self.with_key(secret)

    def with_key(self, secret: str) -> FlaskClient:
        """A client with this key."""
        client = self.app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
        return client


@contextmanager
def rest(processes: Stack, **settings: Any) -> Iterator[Rest]:
    """The API, with the stack's settings or others."""
    with application(processes.settings.model_copy(update=settings)) as app:
        yield Rest(app, processes)
