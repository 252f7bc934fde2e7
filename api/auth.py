"""Bearer keys, deny by default: a view that declares neither a scope nor that it is public is refused to everybody."""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, current_app, g, request

from api.services import transaction
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
    g.principal = _authenticated()
    if access is None:
        raise ScopeMissing("This endpoint is open to nobody.")
    if not g.principal.may(Scope(access)):
        raise ScopeMissing(scope=access)


def _authenticated() -> Principal:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized
    with transaction() as session:
        found = keys.authenticate(session, secret.strip())
    if found is None:
        raise Unauthorized("This key is unknown or was revoked.")
    return found
