"""Clients of the application, and the API as it runs in service."""

from tests.api.conftest import app, champion, client, door, server, stranger

__all__ = ["app", "champion", "client", "door", "server", "stranger"]
