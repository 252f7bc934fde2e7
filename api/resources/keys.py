"""API keys: made, listed and revoked by an administrator."""

import uuid
from typing import Any

from api.http.auth import needs
from api.http.bodies import Blueprint, takes
from api.http.context import tenant, transaction
from api.http.idempotency import idempotent
from api.http.waiting import one_page
from api.resources.requests import KeyRequest
from api.resources.schemas import KeySchema, KeysPage, NewKeySchema
from jobs import keys
from jobs.keys import Scope

blueprint = Blueprint("keys", __name__, url_prefix="/keys", description="Who may ask what.")


@blueprint.route("", methods=["POST"])
@needs(Scope.ADMIN)
@takes(json=KeyRequest)
@blueprint.response(201, NewKeySchema)
@blueprint.doc(operationId="createKey")
@idempotent(secrets=["secret"])
def create_key(body: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Make a key. Its secret is shown this once."""
    with transaction() as session:
        new = keys.create(session, body["name"], body["scopes"], tenant())
        session.refresh(new.key)
    shown = {name: getattr(new.key, name) for name in KeySchema().fields} | {"secret": new.secret}
    return shown, 201, {"Location": f"/keys/{new.key.id}"}


@blueprint.route("")
@needs(Scope.ADMIN)
@blueprint.response(200, KeysPage)
@blueprint.doc(operationId="listKeys")
def list_keys() -> dict[str, Any]:
    """List keys, oldest first."""
    with transaction() as session:
        return one_page(keys.listed(session, tenant()))


@blueprint.route("/<id:key_id>", methods=["DELETE"])
@needs(Scope.ADMIN)
@blueprint.response(204)
@blueprint.doc(operationId="revokeKey")
def revoke_key(key_id: uuid.UUID) -> None:
    """Revoke a key."""
    with transaction() as session:
        keys.revoke(session, tenant(), key_id)
