"""What the tenant uses of its quotas: storage and queue."""

from typing import Any

import marshmallow as ma
from marshmallow import fields

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import services, tenant, transaction
from api.http.fields import Answer
from jobs.keys import Scope
from jobs.storage.usage import usage
from jobs.tables import TenantLoad

blueprint = Blueprint("usage", __name__, description="What you use of your quotas.")


class StorageSchema(Answer):
    """Stored bytes. Equal scans count once; open uploads count with their declared size."""

    used = fields.Integer()
    limit = fields.Integer(allow_none=True, metadata={"description": "Null: there is none."})
    scans = fields.Integer()
    datasets = fields.Integer()
    uploads = fields.Integer()


class QueueUsageSchema(Answer):
    """Scans and batches of jobs that have not ended; a training counts as one scan."""

    scans = fields.Integer()
    scans_limit = fields.Integer()
    batches = fields.Integer()
    batches_limit = fields.Integer()


class UsageSchema(ma.Schema):
    """What the tenant of the key uses, and its limits."""

    storage = fields.Nested(StorageSchema, required=True)
    queue = fields.Nested(QueueUsageSchema, required=True)


@blueprint.route("/usage")
@needs(Scope.JOBS_READ)
@blueprint.response(200, UsageSchema)
@blueprint.doc(operationId="getUsage")
def get_usage() -> dict[str, Any]:
    """Show what you use of your storage and of the queue."""
    settings = services().settings
    with transaction() as session:
        stored, load = usage(session, tenant()), session.get(TenantLoad, tenant())
    storage = {**vars(stored), "used": stored.total, "limit": settings.quota_storage_bytes or None}
    queue = {"scans": load.scans if load else 0, "scans_limit": settings.quota_scans}
    queue |= {"batches": load.batches if load else 0, "batches_limit": settings.quota_batches}
    return {"storage": storage, "queue": queue}
