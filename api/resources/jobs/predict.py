"""Prediction requests, and the jobs made of them: scans stored, model pinned, rows written."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate
from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage

from api.http.context import admit, principal, quota, services, tenant, transaction
from api.http.fields import File, ImageOrScanId, List, Metadata, ModelChoice, exactly_one
from api.http.idempotency import key
from api.http.pipelines.fields import PipelineName, TaskName, spec_of
from api.intake import manifests, scan_store
from api.intake.scan_store import MAX_SCANS
from api.intake.upload_store import from_upload
from api.resources.jobs.explanations import Explain
from api.resources.jobs.receivers import NamesReceiver, receiver_of
from jobs.datasets import catalog
from jobs.errors import BadArchive, Invalid
from jobs.models import operating_points, registry
from jobs.queue import pace
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from jobs.storage import archives
from jobs.storage.archives import Limits, Members
from jobs.tables import ModelVersion
from ml.spec.pipeline import Inputs

Body = dict[str, Any]
MANIFEST = (
    "CSV with a header row (comma, semicolon or tab), or NDJSON; UTF-8. Each row has exactly one of `file` (a file in "
    "the same body or zip), `scan_id` and `url`, and may have `custom_id`, `patient` and `study`."
)


class _Prediction(NamesReceiver):
    model = ModelChoice()
    pipeline = PipelineName()
    task = TaskName()
    precision = fields.String(
        validate=validate.OneOf(["auto", "fp32", "bf16", "int8"]),
        metadata={"description": "auto: the fastest one that the model was admitted for and that the worker supports."},
    )
    explain = Explain(load_default=False)
    metadata = Metadata(load_default=dict)
    lane = fields.String(validate=validate.OneOf([str(Lane.URGENT), str(Lane.BATCH)]))


class PredictJson(_Prediction):
    """One scan: its bytes in base64, or the id of a stored one."""

    image = ImageOrScanId()
    scan_id = fields.UUID()
    custom_id = fields.String(validate=validate.Length(1, 200))

    @ma.validates_schema
    def _one_scan(self, data: dict[str, Any], **kwargs: Any) -> None:
        exactly_one(data, "image", "scan_id")


class PredictUpload(_Prediction):
    """One scan as a file."""

    file = File(required=True)
    custom_id = fields.String(validate=validate.Length(1, 200))


class _CustomIds(_Prediction):
    custom_ids = List(fields.String(validate=validate.Length(1, 200)), validate=validate.Length(max=MAX_SCANS))


class BatchJson(_CustomIds):
    """Scans that are stored already, all of a dataset, or a whole upload: one scan, or one zip of them.

    `custom_ids` follow the order of `scan_ids`.
    """

    scan_ids = List(fields.UUID(), validate=validate.Length(1, MAX_SCANS))
    dataset_id = fields.UUID()
    upload_id = fields.UUID()

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        exactly_one(data, "scan_ids", "dataset_id", "upload_id")
        if "custom_ids" in data and len(data["custom_ids"]) != len(data.get("scan_ids", ())):
            raise ma.ValidationError("Must be as many as scan_ids.", "custom_ids")


class BatchUpload(_CustomIds):
    """Many files, or one zip of them. `custom_ids` follow the order of the files, unless a manifest says all."""

    files: Any = List(File(), validate=validate.Length(1, MAX_SCANS))
    manifest: Any = File(metadata={"description": MANIFEST})

    @ma.validates_schema
    def _as_many_ids(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "manifest" not in data and "files" not in data:
            raise ma.ValidationError("Missing data for required field.", "files")
        if "manifest" in data and "custom_ids" in data:
            raise ma.ValidationError("Write them into the manifest.", "custom_ids")
        if "custom_ids" in data and len(data["custom_ids"]) != len(data["files"]):
            raise ma.ValidationError("Must be as many as files.", "custom_ids")


class BatchManifest(_Prediction):
    """A manifest alone as the body; the rest stands in the query."""

    manifest = File(required=True, metadata={"description": MANIFEST})


def predict_one(body: Body) -> uuid.UUID:
    """Submit a prediction of one scan: a file, bytes, or a stored scan. Returns the job's id.

    Raises:
        BadInput, TooLarge, ScanNotFound, NoChampion, ModelNotFound, ModelFileGone, Invalid, QuotaExceeded, QueueFull
    """
    source: Any = body.get("file", body.get("image", body.get("scan_id")))
    name = scan_store.file_name(body["file"]) if "file" in body else None
    if isinstance(source, uuid.UUID):
        with transaction() as session:
            model = _model(session, body)
            scan_store.results_of_stored(session, [source])
        scan_id = source
    else:
        # Before the model: a file that is no image gets the same error with or without a champion.
        media = scan_store.inspect_scan(source.stream, spec_of(body).inputs, "/file" if "file" in body else "/image")
        model = _pin_model(body)
        admit()
        scan_id = scan_store.store_scan(source.stream, media)[0].id
    return _submit(JobKind.PREDICT, Lane.URGENT, body, model, [NewResult(scan_id, name, body.get("custom_id"))])


@from_upload("files", many=True)
def predict_many(body: Body) -> uuid.UUID:
    """Submit a batch: files, a zip, an upload, a manifest, stored scans, or a dataset. Returns the job's id.

    A file of several frames gets a result for each, or with `whole_files` (which no client can send) one.

    Raises:
        UploadNotFound, UploadIncomplete, UploadBusy
        BadArchive, ScanNotFound, DatasetNotFound, DatasetNotReady, NoChampion, ModelNotFound, ModelFileGone, Invalid,
        QuotaExceeded, QueueFull
    """
    limits = Limits.of(services().settings)
    with _zip_members(body, limits) as members:
        notes = list(_notes(members))
        manifest = manifests.read_manifest(body.get("manifest"), body.get("files", ()), members)
        # After the files, as in `predict_one`.
        model = _pin_model(body)
        admit(len(manifest.rows) if manifest else _count_scans(body, members), batches=1)
        scans = manifest.store_scans(spec_of(body).inputs) if manifest else _store(body, members, limits)
        if body.get("whole_files"):
            scans = [replace(scan, frames=1) for scan in scans]
    return _submit(JobKind.PREDICT_BATCH, Lane.BATCH, body, model, scans, body.get("dataset_id"), notes)


@contextmanager
def _zip_members(body: Body, limits: Limits) -> Iterator[Members | None]:
    """The checked files of the zip that was sent, without those that are no items; None if it is no zip."""
    files: list[FileStorage] = body.get("files", [])
    if len(files) == 1 and archives.is_zip(files[0].stream):
        with archives.open_zip(files[0].stream, limits) as members:
            yield _items(members, spec_of(body).inputs)
    else:
        yield None


def _items(members: Members, inputs: Inputs) -> Members:
    """The files without those that lie beside items, such as patients.csv."""
    kept = [member for member in members if PurePosixPath(member.name).name.lower() not in inputs.beside]
    if not kept:
        raise BadArchive("The zip holds no file that can be predicted.")
    return Members(kept, members.junk + len(members) - len(kept), members.guessed_names)


def _notes(members: Members | None) -> Iterator[dict[str, str]]:
    """The job's warnings: what was passed over, and what was guessed."""
    if members and members.junk:
        detail = (
            "Hidden files, what systems and licences put beside scans, and lists of patients were passed over: "
            f"{members.junk}."
        )
        yield {"code": "FILES_PASSED_OVER", "detail": detail}
    if members and members.guessed_names:
        detail = f"Names in the zip that are not UTF-8, and were read as cp437: {members.guessed_names}."
        yield {"code": "NAMES_GUESSED", "detail": detail}


def _count_scans(body: Body, members: Members | None) -> int:
    """Number of scans in the job; 1 for a dataset, whose scans are counted by `submit`."""
    return len(members or body.get("files") or body.get("scan_ids") or [body["dataset_id"]])


def _store(body: Body, members: Members | None, limits: Limits) -> list[NewResult]:
    inputs = spec_of(body).inputs
    if members is not None:
        return scan_store.store_scans(scan_store.from_zip(members), inputs)
    if "files" in body:
        return scan_store.store_scans(scan_store.from_files(body["files"], body.get("custom_ids", ())), inputs)
    if "dataset_id" in body:
        return _store_dataset(body["dataset_id"], inputs, limits)
    with transaction() as session:
        return scan_store.results_of_stored(session, body["scan_ids"], body.get("custom_ids", ()))


def _store_dataset(dataset_id: uuid.UUID, inputs: Inputs, limits: Limits) -> list[NewResult]:
    with transaction() as session:
        sha256 = catalog.ready(session, tenant(), dataset_id).archive_sha256
    try:
        with services().blobs.open(sha256) as stream, archives.open_zip(stream, limits) as members:
            return scan_store.store_scans(scan_store.from_zip(_items(members, inputs)), inputs)
    except FileNotFoundError:
        raise BadArchive("The dataset's zip is no longer stored. Upload it again.") from None


def _pin_model(body: Body) -> ModelVersion:
    with transaction() as session:
        return _model(session, body)


def _model(session: Session, body: Body) -> ModelVersion:
    version = registry.resolve(session, tenant(), body.get("model"), body.get("pipeline"), body.get("task"))
    _refuse_unable(version, body)
    receiver_of(body)  # refused before anything is stored
    registry.refuse_unadmitted(version, body.get("precision", "auto"))
    registry.require_file(version, services().blobs)
    return version


def _refuse_unable(version: ModelVersion, body: Body) -> None:
    """Refuse a version of another pipeline than the one that the scans were inspected for."""
    if version.pipeline != spec_of(body).name:
        detail = f"Version {version.version} is of the pipeline {version.pipeline}: set pipeline: {version.pipeline}."
        raise Invalid(detail, "/pipeline")
    if body.get("explain") and "explain" not in spec_of(body).tasks:
        raise Invalid(f"The pipeline {version.pipeline} explains nothing: leave explain out.", "/explain")


def _submit(
    kind: JobKind,
    lane: Lane,
    body: Body,
    model: ModelVersion,
    scans: Sequence[NewResult],
    dataset_id: uuid.UUID | None = None,
    warnings: Iterable[dict[str, str]] = (),
) -> uuid.UUID:
    new = NewJob(
        tenant_id=tenant(),
        kind=kind,
        pipeline=model.pipeline,
        task=model.task,
        lane=Lane(body.get("lane", lane)),
        params={name: body[name] for name in ("precision", "explain") if body.get(name)},
        metadata=body["metadata"],
        dataset_id=dataset_id,
        model_id=model.id,
        model_version=model.version,
        operating_point=operating_points.pin(model),
        created_by=principal().key_id,
        idempotency_key=key(),
        warnings=list(warnings),
        receiver=receiver_of(body),
    )
    with transaction() as session:
        if dataset_id is not None:
            catalog.ready(session, tenant(), dataset_id)  # locked, so that it is not deleted before the job is stored
        chunk = pace.chunk_size(session, new.lane, services().settings)
        return submit(session, new, scans, chunk, quota()).id
