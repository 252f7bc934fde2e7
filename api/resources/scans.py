"""Scans: images and DICOM files, stored once by content."""

import uuid
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import tenant, transaction
from api.http.fields import Base64, File, List, Time
from api.http.idempotency import idempotent
from api.http.pipelines.fields import PipelineName, spec_of
from api.http.versioning import address
from api.intake import scan_store
from api.intake.scan_store import MAX_SCANS
from api.resources.deletions import Accepted, DeletionSchema, accepted
from jobs.keys import Scope
from jobs.results import scan_registry
from jobs.tables import Scan

blueprint = Blueprint("scans", __name__, url_prefix="/scans", description=f"Single {spec_of({}).inputs.described}.")


class ScanUpload(ma.Schema):
    """One image or DICOM file."""

    file = File(required=True)
    pipeline = PipelineName()


class ScanJson(ma.Schema):
    """One image or DICOM file in base64."""

    image = Base64(required=True)
    pipeline = PipelineName()


class KnownRequest(ma.Schema):
    """SHA-256 of files, in hex."""

    sha256 = List(
        fields.String(validate=validate.Regexp(r"\A[0-9a-f]{64}\Z", error="Must be 64 lower-case hex digits.")),
        required=True,
        validate=validate.Length(max=MAX_SCANS),
    )


class ScanSchema(ma.Schema):
    """A stored scan. The file's name and patient data are not part of it."""

    id = fields.UUID()
    sha256 = fields.String()
    size = fields.Integer()
    media_type = fields.String()
    width = fields.Integer()
    height = fields.Integer()
    created_at = Time()

    @ma.post_dump
    def _leave_out_unknown_sizes(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Items of other pipelines have no width and height."""
        return {name: value for name, value in data.items() if value is not None}


class KnownScansSchema(ma.Schema):
    """Ids of stored scans by the SHA-256 of their bytes."""

    data = fields.Dict(keys=fields.String(), values=fields.UUID(), required=True)


@blueprint.route("", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=ScanJson, multipart=ScanUpload)
@blueprint.response(201, ScanSchema)
@blueprint.alt_response(200, schema=ScanSchema, description="These bytes are stored already.", success=True)
@blueprint.doc(operationId="createScan")
@idempotent()
def create_scan(body: dict[str, Any]) -> tuple[Scan, int, dict[str, str]]:
    """Store a scan. The same bytes give the same id."""
    stream = body["file" if "file" in body else "image"].stream
    media = scan_store.inspect_scan(stream, spec_of(body).inputs, "/file" if "file" in body else "/image")
    scan, new = scan_store.store_scan(stream, media)
    return scan, 201 if new else 200, {"Location": address(f"/scans/{scan.id}")}


@blueprint.route("/known", methods=["POST"])
@needs(Scope.JOBS_READ)
@accepts_body(json=KnownRequest)
@blueprint.response(200, KnownScansSchema)
@blueprint.doc(operationId="findKnownScans")
def find_known(body: dict[str, Any]) -> dict[str, Any]:
    """Look up which files are stored already, by hash, so that only the others need to be sent."""
    with transaction() as session:
        return {"data": scan_registry.by_hash(session, tenant(), body["sha256"])}


@blueprint.route("/<id:scan_id>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, ScanSchema)
@blueprint.doc(operationId="getScan")
def get_scan(scan_id: uuid.UUID) -> Scan:
    """Show a scan."""
    with transaction() as session:
        return scan_registry.get(session, tenant(), scan_id)


@blueprint.route("/<id:scan_id>", methods=["DELETE"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, DeletionSchema)
@blueprint.doc(operationId="deleteScan")
def delete_scan(scan_id: uuid.UUID) -> Accepted:
    """Delete a scan with all results, explanations and feedback of it. The receipt says what went."""
    return accepted(scan_registry.delete, scan_id)
