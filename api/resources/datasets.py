"""Datasets: create, list, show, delete."""

import os
import uuid
from pathlib import PurePosixPath
from typing import IO, Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import admit, principal, quota, services, tenant, transaction
from api.http.fields import Answer, File, ModelChoice, Time, exactly_one, one_of
from api.http.idempotency import idempotent, key
from api.http.paging import PageQuery, PageSchema
from api.http.pipelines.fields import PipelineName
from api.http.versioning import address
from api.intake import scan_store
from api.intake.feedback_zip import feedback_zip
from api.intake.storage_room import storage_room
from api.intake.upload_store import from_upload
from api.resources.deletions import Accepted as DeletionAccepted
from api.resources.deletions import DeletionSchema, accepted
from jobs.datasets import catalog
from jobs.datasets.catalog import DatasetView
from jobs.keys import Scope
from jobs.paging import Page
from jobs.results import queries
from jobs.states import DatasetState
from jobs.storage import archives
from jobs.storage.archives import Limits
from ml.spec.pipeline import IMAGE

blueprint = Blueprint(
    "datasets", __name__, url_prefix="/datasets", description="Zips with one folder per class, checked before use."
)


class DatasetUpload(ma.Schema):
    """A zip with one folder per class."""

    file = File(required=True)
    pipeline = PipelineName(load_default=IMAGE)
    name = fields.String(validate=validate.Length(1, 200))


class TruthsChoice(ma.Schema):
    """Which feedback: all, or since a time, or on one version's predictions."""

    since = Time()
    model = ModelChoice()


class DatasetJson(ma.Schema):
    """A finished upload of such a zip, or scans with feedback."""

    upload_id = fields.UUID()
    truths = fields.Nested(TruthsChoice, unknown=ma.RAISE)
    pipeline = PipelineName(load_default=IMAGE)
    name = fields.String(validate=validate.Length(1, 200))

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        exactly_one(data, "upload_id", "truths")


class DatasetSchema(Answer):
    """A dataset: `problems` make it invalid, `warnings` make scores on it doubtful."""

    id = fields.UUID(attribute="dataset.id")
    name = fields.String(attribute="dataset.name")
    pipeline = fields.String(attribute="dataset.pipeline")
    state = fields.String(validate=one_of(DatasetState))
    digest = fields.String(attribute="dataset.digest", allow_none=True)
    classes = fields.Dict(attribute="dataset.classes", keys=fields.String(), values=fields.Integer(), allow_none=True)
    problems = fields.List(fields.String())
    warnings = fields.List(fields.String(), metadata={"description": "Reasons to doubt scores on it."})
    size = fields.Integer(attribute="dataset.archive_bytes")
    job_id = fields.UUID(attribute="dataset.job_id", allow_none=True)
    created_at = Time(attribute="dataset.created_at")


class CheckedDatasetSchema(DatasetSchema):
    """A dataset with the full report of its check."""

    report = fields.Dict(attribute="dataset.report", allow_none=True)


class DatasetsPage(PageSchema):
    """Datasets, newest first."""

    data = fields.List(fields.Nested(DatasetSchema), required=True)


Accepted = tuple[DatasetView, int, dict[str, str]]


def _accepted(view: DatasetView) -> Accepted:
    return view, 202, {"Location": address(f"/datasets/{view.dataset.id}"), "Retry-After": "1"}


def _checked_by(job_id: uuid.UUID) -> Accepted:
    with transaction() as session:
        dataset_id = queries.job(session, tenant(), job_id).job.dataset_id
        return _accepted(catalog.get(session, tenant(), dataset_id or job_id))  # deleted since: 404


@blueprint.route("", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=DatasetJson, multipart=DatasetUpload)
@blueprint.response(202, DatasetSchema)
@blueprint.doc(operationId="createDataset")
@idempotent(_checked_by)
@from_upload("file")
def create_dataset(body: dict[str, Any]) -> Accepted:
    """Create a dataset from a zip, a finished upload, or scans with feedback; a job checks it."""
    if "truths" in body:
        with feedback_zip(body["truths"]) as stream:
            return _created(body, body.get("name", "truths"), stream)
    file = body["file"]
    # An empty zip is accepted: its check reports what is missing, as for any invalid dataset.
    archives.count_members(file.stream, Limits.of(services().settings), may_be_empty=True)
    admit()
    name = body.get("name") or PurePosixPath(scan_store.file_name(file) or "dataset").stem[:200]
    return _created(body, name, file.stream)


def _created(body: dict[str, Any], name: str, stream: IO[bytes]) -> Accepted:
    storage_room().take(stream.seek(0, os.SEEK_END))
    stream.seek(0)
    blob = services().blobs.put(stream)
    with transaction() as session:
        pipeline = body["pipeline"]
        view, _ = catalog.create(session, tenant(), name, blob, principal().key_id, key(), quota(), pipeline)
    return _accepted(view)


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, DatasetsPage)
@blueprint.doc(operationId="listDatasets")
def list_datasets(query: dict[str, Any]) -> Page[DatasetView]:
    """List datasets, newest first."""
    with transaction() as session:
        return catalog.list_datasets(session, tenant(), **query)


@blueprint.route("/<id:dataset_id>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, CheckedDatasetSchema)
@blueprint.doc(operationId="getDataset")
def get_dataset(dataset_id: uuid.UUID) -> DatasetView:
    """Show a dataset."""
    with transaction() as session:
        return catalog.get(session, tenant(), dataset_id)


@blueprint.route("/<id:dataset_id>", methods=["DELETE"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, DeletionSchema)
@blueprint.doc(operationId="deleteDataset")
def delete_dataset(dataset_id: uuid.UUID) -> DeletionAccepted:
    """Delete a dataset that no unfinished job uses, and the jobs that checked it. The receipt says what went."""
    return accepted(catalog.delete, dataset_id)
