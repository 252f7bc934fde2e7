"""The REST API and the console. `create_app` makes the Flask application; importing this package has no effects."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from jobs.settings import Settings


def create_app(settings: "Settings | None" = None) -> "Flask":
    """The application.

    Args:
        settings: read from the environment where none are given.
    """
    from api.application import build
    from jobs.settings import Settings

    return build(settings or Settings())
