"""A log line for each request, with an id. It contains nothing that a client wrote: no path, query or body."""

import re
import time
import uuid

import structlog
from flask import Flask, Response, g, request

from api.http.versioning import is_versioned

log = structlog.get_logger()
_OWN_ID = re.compile(r"\A[A-Za-z0-9._-]{8,64}\Z")


def register(app: Flask) -> None:
    """Give every request an id, and log its response."""
    app.before_request(_start)
    app.after_request(_end)


def _start() -> None:
    g.started = time.monotonic()
    given = request.headers.get("X-Request-Id", "")
    g.request_id = given if _OWN_ID.match(given) else uuid.uuid4().hex


def _end(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")
    principal = getattr(g, "principal", None)
    # The rule, not the path: a path may contain anything.
    rule = request.url_rule.rule if request.url_rule else None
    level = log.debug if rule and rule.startswith("/health") else log.info
    level(
        "request",
        method=request.method if request.method in KNOWN_METHODS else "OTHER",
        route=rule,
        versioned=is_versioned(),
        status=response.status_code,
        ms=round((time.monotonic() - g.started) * 1000, 1),
        request_id=g.request_id,
        key_id=str(principal.key_id) if principal else None,
        tenant=principal.tenant_id if principal else None,
    )
    return response


KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
