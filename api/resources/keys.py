"""API keys: created, listed and revoked by an administrator."""

import uuid
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import tenant, transaction
from api.http.fields import Answer, List, Time, one_of
from api.http.idempotency import idempotent
from api.http.paging import PageSchema, one_page
from api.http.versioning import address
from jobs import keys
from jobs.keys import Scope
from jobs.tables import ApiKey

blueprint = Blueprint("keys", __name__, url_prefix="/keys", description="API keys and their scopes.")


class KeyRequest(ma.Schema):
    """A new key."""

    name = fields.String(required=True, validate=validate.Length(1, 200))
    scopes = List(fields.String(validate=one_of(Scope)), required=True, validate=validate.Length(1, 4))


class KeySchema(Answer):
    """A key, without its secret."""

    id = fields.UUID()
    name = fields.String()
    scopes = fields.List(fields.String(validate=one_of(Scope)))
    hint = fields.String(metadata={"description": "First characters of the secret."})
    created_at = Time()
    revoked_at = Time(allow_none=True)


class NewKeySchema(KeySchema):
    """A key with its secret, which is shown only once: null in a response repeated by its Idempotency-Key."""

    secret = fields.String(allow_none=True)


class KeysPage(PageSchema):
    """Keys, oldest first."""

    data = fields.List(fields.Nested(KeySchema), required=True)


@blueprint.route("", methods=["POST"])
@needs(Scope.ADMIN)
@accepts_body(json=KeyRequest)
@blueprint.response(201, NewKeySchema)
@blueprint.doc(operationId="createKey")
@idempotent(secrets=["secret"])
def create_key(body: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Create a key. Its secret is shown only now."""
    with transaction() as session:
        new = keys.create(session, body["name"], body["scopes"], tenant())
        session.refresh(new.key)
    response = {name: getattr(new.key, name) for name in KeySchema().fields} | {"secret": new.secret}
    return response, 201, {"Location": address(f"/keys/{new.key.id}")}


@blueprint.route("")
@needs(Scope.ADMIN)
@blueprint.response(200, KeysPage)
@blueprint.doc(operationId="listKeys")
def list_keys() -> dict[str, Any]:
    """List keys, oldest first."""
    with transaction() as session:
        return one_page(keys.list_keys(session, tenant()))


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
