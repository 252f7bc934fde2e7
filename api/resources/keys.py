"""API keys: created, listed, rotated and revoked by an administrator."""

import uuid
from collections.abc import Collection
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import principal, tenant, transaction
from api.http.fields import Answer, Float, List, Time, one_of
from api.http.idempotency import idempotent
from api.http.paging import PageQuery, PageSchema
from api.http.versioning import address
from jobs import keys
from jobs.errors import ScopeMissing
from jobs.keys import NewKey, Scope
from jobs.paging import Page
from jobs.tables import ApiKey

MAX_OVERLAP_HOURS = 24 * 90

blueprint = Blueprint("keys", __name__, url_prefix="/keys", description="API keys and their scopes.")


class KeyRequest(ma.Schema):
    """A new key. Without `expires_at` it never expires."""

    name = fields.String(required=True, validate=validate.Length(1, 200))
    scopes = List(fields.String(validate=one_of(Scope)), required=True, validate=validate.Length(1, len(list(Scope))))
    expires_at = Time()


class RotationRequest(ma.Schema):
    """How long both keys are valid, and when the new one expires: by default after the old one's lifetime."""

    overlap_hours = Float(load_default=24.0, validate=validate.Range(0, MAX_OVERLAP_HOURS))
    expires_at = Time()


class KeySchema(Answer):
    """A key, without its secret."""

    id = fields.UUID()
    name = fields.String()
    scopes = fields.List(fields.String(validate=one_of(Scope)))
    hint = fields.String(metadata={"description": "First characters of the secret."})
    created_at = Time()
    expires_at = Time(allow_none=True, metadata={"description": "Null: never."})
    last_used_at = Time(allow_none=True, metadata={"description": "To the hour. Null: never used."})
    replaces = fields.UUID(allow_none=True, metadata={"description": "The key that it was rotated from."})
    revoked_at = Time(allow_none=True)


class NewKeySchema(KeySchema):
    """A key with its secret, which is shown only once: null in a response repeated by its Idempotency-Key."""

    secret = fields.String(allow_none=True)


class KeysPage(PageSchema):
    """Keys, oldest first."""

    data = fields.List(fields.Nested(KeySchema), required=True)


Created = tuple[dict[str, Any], int, dict[str, str]]


@blueprint.route("", methods=["POST"])
@needs(Scope.ADMIN)
@accepts_body(json=KeyRequest)
@blueprint.response(201, NewKeySchema)
@blueprint.doc(operationId="createKey")
@idempotent(secrets=["secret"])
def create_key(body: dict[str, Any]) -> Created:
    """Create a key. Its secret is shown only now."""
    _require_scopes(body["scopes"])
    with transaction() as session:
        new = keys.create(session, body["name"], body["scopes"], tenant(), body.get("expires_at"))
        session.refresh(new.key)
    return _created(new)


@blueprint.route("/<id:key_id>/rotate", methods=["POST"])
@needs(Scope.ADMIN)
@accepts_body(json=RotationRequest)
@blueprint.response(201, NewKeySchema)
@blueprint.doc(operationId="rotateKey")
@idempotent(secrets=["secret"])
def rotate_key(body: dict[str, Any], key_id: uuid.UUID) -> Created:
    """Create a key that takes the place of another, which expires after `overlap_hours`. Its secret is shown only
    now."""
    with transaction() as session:
        _require_scopes(keys.get(session, tenant(), key_id).scopes)
        new = keys.rotate(session, tenant(), key_id, body["overlap_hours"] * 3600, body.get("expires_at"))
        session.refresh(new.key)
    return _created(new)


def _require_scopes(scopes: Collection[str]) -> None:
    """An administrator of a tenant gives nobody what only operators have."""
    if missing := principal().missing(scopes):
        raise ScopeMissing(scope=missing)


def _created(new: NewKey) -> Created:
    response = {name: getattr(new.key, name) for name in KeySchema().fields} | {"secret": new.secret}
    return response, 201, {"Location": address(f"/keys/{new.key.id}")}


@blueprint.route("")
@needs(Scope.ADMIN)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, KeysPage)
@blueprint.doc(operationId="listKeys")
def list_keys(query: dict[str, Any]) -> Page[ApiKey]:
    """List keys, oldest first."""
    with transaction() as session:
        return keys.list_keys(session, tenant(), **query)


@blueprint.route("/<id:key_id>")
@needs(Scope.ADMIN)
@blueprint.response(200, KeySchema)
@blueprint.doc(operationId="getKey")
def get_key(key_id: uuid.UUID) -> ApiKey:
    """Show a key."""
    with transaction() as session:
        return keys.get(session, tenant(), key_id)


@blueprint.route("/<id:key_id>", methods=["DELETE"])
@needs(Scope.ADMIN)
@blueprint.response(204)
@blueprint.doc(operationId="revokeKey")
def revoke_key(key_id: uuid.UUID) -> None:
    """Revoke a key."""
    with transaction() as session:
        keys.revoke(session, tenant(), key_id)
