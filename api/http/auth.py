"""API keys, deny by default: a view that declares neither a scope nor that it is public refuses every request.

A key comes as a bearer token, or by HTTP Basic (RFC 7617), so that a client without support for keys can have one in
its URL: http://:rq_…@host:8080. The API never asks for Basic, though: a browser would show its own dialogue, store what
was typed, and send it along with requests from other sites.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, current_app, g, request

from api.http.context import services, transaction
from jobs import keys
from jobs.errors import ScopeMissing, Unauthorized
from jobs.keys import Principal, Scope

View = TypeVar("View", bound=Callable[..., Any])
PUBLIC = "public"


def needs(scope: Scope) -> Callable[[View], View]:
    """Declare the scope that a view needs."""
    return _marked(scope)


def public(view: View) -> View:
    """Declare that a view needs no key."""
    return _marked(PUBLIC)(view)


def access_of(app: Flask, endpoint: str) -> str | None:
    """The scope that an endpoint declares, or `public`, or None."""
    view: Any = app.view_functions[endpoint]
    return getattr(view, "access", None)


def register(app: Flask) -> None:
    """Check the key before every request."""
    app.before_request(_check)


def _marked(access: str) -> Callable[[View], View]:
    def mark(view: View) -> View:
        view.access = access  # type: ignore[attr-defined]
        return view

    return mark


def _check() -> None:
    if request.endpoint is None:
        return  # no such route: Flask answers 404 or 405
    access = access_of(current_app, request.endpoint)
    if access == PUBLIC:
        return
    g.principal = authenticated()
    services().rates.count_request(g.principal.key_id)
    if access is None:
        raise ScopeMissing("This endpoint is open to nobody.")
    if not g.principal.may(Scope(access)):
        raise ScopeMissing(scope=access)


def authenticated() -> Principal:
    """The principal of the request's key.

    Raises:
        Unauthorized
        RateLimited: too many requests of this address had an invalid key.
    """
    secret = _secret()
    if not secret:
        raise Unauthorized
    with transaction() as session:
        found = keys.authenticate(session, secret)
    if found is None:
        services().rates.count_failed_login(request.remote_addr or "")
        raise Unauthorized("This key is unknown, was revoked, or has expired. Ask an administrator for a new one.")
    return found


def _secret() -> str:
    """The request's key; empty without one."""
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    basic = request.authorization
    if basic is None or basic.type != "basic":
        return ""
    return basic.password or basic.username or ""
