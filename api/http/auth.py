"""Keys, deny by default: a view that declares neither a scope nor that it is public is refused to everybody.

A key comes as a bearer's token, or by HTTP Basic (RFC 7617), so that a client which knows nothing of keys can have one
in its address: http://:rq_…@host:8080. We never ask for Basic, though: a browser would show its own dialogue, keep what
was typed, and send it along with requests of other sites.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, current_app, g, request

from api.http.context import transaction
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
    """What an endpoint declares: a scope, `public`, or nothing."""
    view: Any = app.view_functions[endpoint]
    return getattr(view, "access", None)


def register(app: Flask) -> None:
    """Ask for a key before every request."""
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
    if access is None:
        raise ScopeMissing("This endpoint is open to nobody.")
    if not g.principal.may(Scope(access)):
        raise ScopeMissing(scope=access)


def authenticated() -> Principal:
    """Who asks.

    Raises:
        Unauthorized
    """
    secret = _secret()
    if not secret:
        raise Unauthorized
    with transaction() as session:
        found = keys.authenticate(session, secret)
    if found is None:
        raise Unauthorized("This key is unknown or was revoked.")
    return found


def _secret() -> str:
    """The key that came with the request; empty without one."""
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    basic = request.authorization
    if basic is None or basic.type != "basic":
        return ""
    return basic.password or basic.username or ""
