"""Deletions: receipts of what was asked to be deleted, and what of it went."""

import uuid
from typing import Any

from marshmallow import fields

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import principal, tenant, transaction
from api.http.fields import Answer, Part, Time, links_schema, one_of
from api.http.paging import PageQuery, PageSchema
from api.http.versioning import address
from jobs.deletions import receipts
from jobs.deletions.receipts import Receipt
from jobs.keys import Scope
from jobs.paging import Page
from jobs.tables import DeletionKind

blueprint = Blueprint(
    "deletions", __name__, url_prefix="/deletions", description="Receipts of deletions, kept as their audit."
)

DELETING, DELETED = "deleting", "deleted"
COUNTS = "How many of what went: jobs, results, artifacts, files and others."
Accepted = tuple[Receipt, int, dict[str, str]]
DeletionLinks = links_schema("DeletionLinks", ("self",))


class LeftSchema(Answer):
    """What is left outside the database."""

    files = fields.Integer(attribute="files_left", metadata={"description": "In the blob store."})
    mlflow_runs = fields.Integer(attribute="runs_left")


class DeletionSchema(Answer):
    """A receipt. Once it says `deleted`, rows, files and MLflow's run are gone."""

    id = fields.UUID(attribute="deletion.id")
    kind = fields.String(attribute="deletion.kind", validate=one_of(DeletionKind))
    target = fields.String(
        attribute="deletion.target", metadata={"description": "The id of what was deleted; of a model, its version."}
    )
    state = fields.Function(
        lambda found: DELETING if found.deletion.finished_at is None else DELETED,
        metadata={"type": "string", "enum": [DELETING, DELETED]},
    )
    counts = fields.Dict(
        attribute="deletion.counts",
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": COUNTS},
    )
    left = Part(LeftSchema, lambda found: found)
    by_key = fields.UUID(
        attribute="deletion.by_key", allow_none=True, metadata={"description": "The key's id; null: retention."}
    )
    created_at = Time(attribute="deletion.created_at")
    finished_at = Time(attribute="deletion.finished_at", allow_none=True)
    links = Part(DeletionLinks, lambda found: {"self": address(f"/deletions/{found.deletion.id}")})


class DeletionsPage(PageSchema):
    """Receipts, newest first."""

    data = fields.List(fields.Nested(DeletionSchema), required=True)


def accepted(delete: Any, *target: Any, **more: Any) -> Accepted:
    """202 with the receipt of `delete(session, tenant, *target, by_key=…)`, or of the earlier request to delete it."""
    with transaction() as session:
        found = receipts.receipt(session, delete(session, tenant(), *target, by_key=principal().key_id, **more))
    return found, 202, {"Location": address(f"/deletions/{found.deletion.id}"), "Retry-After": "2"}


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, DeletionsPage)
@blueprint.doc(operationId="listDeletions")
def list_deletions(query: dict[str, Any]) -> Page[Receipt]:
    """List receipts of deletions, newest first."""
    with transaction() as session:
        return receipts.list_receipts(session, tenant(), **query)


@blueprint.route("/<id:deletion_id>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, DeletionSchema)
@blueprint.doc(operationId="getDeletion")
def get_deletion(deletion_id: uuid.UUID) -> Receipt:
    """Show the receipt of a deletion: its state, what went, and what is left."""
    with transaction() as session:
        return receipts.get(session, tenant(), deletion_id)
