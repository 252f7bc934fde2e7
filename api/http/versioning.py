"""`/v1` in front of every path. The paths without it are aliases: an answer's addresses begin as the request's did."""

from collections.abc import Iterable
from typing import Any

from flask import Flask, abort, request

PREFIX = "/v1"


def register(app: Flask) -> None:
    """Answer `/v1/…` as `/…`. Routes know nothing of the prefix: it moves from PATH_INFO to SCRIPT_NAME (WSGI)."""
    inner = app.wsgi_app

    def without_prefix(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == PREFIX or path.startswith(f"{PREFIX}/"):
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + PREFIX
            environ["PATH_INFO"] = path[len(PREFIX) :]
        return inner(environ, start_response)

    app.wsgi_app = without_prefix  # type: ignore[method-assign]


def address(path: str) -> str:
    """A path as an answer writes it: with the prefix by which the request came."""
    return request.script_root + path


def is_versioned() -> bool:
    """Whether the request came by `/v1`."""
    return request.script_root.endswith(PREFIX)


def only_at_the_root() -> None:
    """404 under `/v1`. For `before_request` of what is no part of the versioned API."""
    if is_versioned():
        abort(404)
