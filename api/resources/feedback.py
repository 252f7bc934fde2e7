"""Feedback: the true class of predicted scans, as pathology reports it."""

import uuid
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import principal, tenant, transaction
from api.http.fields import Answer, Time
from api.http.idempotency import attach_resource, idempotent
from jobs.keys import Scope
from jobs.models import feedback
from jobs.results import queries
from jobs.tables import Truth

blueprint = Blueprint(
    "truths", __name__, url_prefix="/jobs", description="Feedback: the true class of predicted scans."
)


class TruthRequest(ma.Schema):
    """The true class, one of the model's classes."""

    label = fields.String(required=True, validate=validate.Length(1, 100))


class TruthSchema(Answer):
    """True and predicted class of a scan."""

    scan_id = fields.UUID()
    job_id = fields.UUID(allow_none=True)
    label = fields.String()
    predicted = fields.String()
    right = fields.Function(lambda truth: truth.label == truth.predicted, metadata={"type": "boolean"})
    confidence = fields.Float()
    disposition = fields.String(allow_none=True)
    predicted_at = Time()
    at = Time(metadata={"description": "When it was reported."})


@blueprint.route("/<id:job_id>/results/<id:scan_id>/truth", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=TruthRequest)
@blueprint.response(201, TruthSchema)
@blueprint.doc(operationId="tellTruth")
@idempotent()
def report_truth(body: dict[str, Any], job_id: uuid.UUID, scan_id: uuid.UUID) -> Truth:
    """Report the true class of a scan. A second report corrects the first."""
    with transaction() as session:
        attach_resource(session, job_id)  # first: idempotency keys are locked before jobs
        view = queries.job(session, tenant(), job_id)
        return feedback.record(session, view, scan_id, body["label"], principal().key_id)


@blueprint.route("/<id:job_id>/results/<id:scan_id>/truth")
@needs(Scope.JOBS_READ)
@blueprint.response(200, TruthSchema)
@blueprint.doc(operationId="getTruth")
def get_truth(job_id: uuid.UUID, scan_id: uuid.UUID) -> Truth:
    """Show the latest feedback on a scan for this job's model."""
    with transaction() as session:
        return feedback.latest(session, queries.job(session, tenant(), job_id), scan_id)
