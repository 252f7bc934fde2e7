"""From a checked request to a prediction job: its scans stored, its model pinned, its rows written."""

import io
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage

from api import intake
from api.services import principal, services, tenant, transaction
from jobs import archives, datasets, registry
from jobs.archives import Limits
from jobs.errors import BadArchive
from jobs.states import JobKind, Lane
from jobs.submission import NewJob, NewResult, submit
from jobs.tables import ModelVersion

Body = dict[str, Any]


def predict_one(body: Body) -> uuid.UUID:
    """Submit one scan: a file, bytes, or a stored one. Returns the job's id.

    Raises:
        NotAnImage, TooLarge, ScanNotFound, NoChampion, ModelNotFound
    """
    source: Any = body["file"].stream if "file" in body else body.get("image", body.get("scan_id"))
    name = intake.file_name(body["file"]) if "file" in body else None
    if isinstance(source, uuid.UUID):
        with transaction() as session:
            model = _model(session, body)
            intake.known(session, [source])
        scan_id = source
    else:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        # Before the model: what is no image is no image whether or not there is one.
        looked = intake.check(stream, "/file" if "file" in body else "/image")
        model = _pinned(body)
        scan_id = intake.keep(stream, looked)[0].id
    return _submit(JobKind.PREDICT, Lane.URGENT, body, model, [NewResult(scan_id, name, body.get("custom_id"))])


def predict_many(body: Body) -> uuid.UUID:
    """Submit a batch: files, one zip, stored scans, or a dataset. Returns the job's id.

    Raises:
        BadArchive, ScanNotFound, DatasetNotFound, DatasetNotReady, NoChampion, ModelNotFound
    """
    files: list[FileStorage] = body.get("files", [])
    zipped = len(files) == 1 and archives.is_zip(files[0].stream)
    limits = Limits.of(services().settings)
    if zipped:
        archives.check(files[0].stream, limits)  # before the model, as above
    model = _pinned(body)
    dataset_id = None
    if zipped:
        with archives.opened(files[0].stream, limits) as members:
            scans = intake.keep_all(intake.unpacked(members))
    elif files:
        scans = intake.keep_all(intake.uploaded(files, body.get("custom_ids", ())))
    elif "scan_ids" in body:
        with transaction() as session:
            scans = intake.known(session, body["scan_ids"], body.get("custom_ids", ()))
    else:
        dataset_id = body["dataset_id"]
        scans = _of_dataset(dataset_id, limits)
    return _submit(JobKind.PREDICT_BATCH, Lane.BATCH, body, model, scans, dataset_id)


def _of_dataset(dataset_id: uuid.UUID, limits: Limits) -> list[NewResult]:
    with transaction() as session:
        sha256 = datasets.ready(session, tenant(), dataset_id).archive_sha256
    try:
        with services().artifacts.open(sha256) as stream, archives.opened(stream, limits) as members:
            return intake.keep_all(intake.unpacked(members))
    except FileNotFoundError:
        raise BadArchive("The dataset's zip is no longer stored. Upload it again.") from None


def _pinned(body: Body) -> ModelVersion:
    with transaction() as session:
        return _model(session, body)


def _model(session: Session, body: Body) -> ModelVersion:
    return registry.resolve(session, tenant(), body.get("model"))


def _submit(
    kind: JobKind,
    lane: Lane,
    body: Body,
    model: ModelVersion,
    scans: Sequence[NewResult],
    dataset_id: uuid.UUID | None = None,
) -> uuid.UUID:
    new = NewJob(
        tenant_id=tenant(),
        kind=kind,
        lane=Lane(body.get("lane", lane)),
        metadata=body["metadata"],
        dataset_id=dataset_id,
        model_id=model.id,
        model_version=model.version,
        created_by=principal().key_id,
    )
    with transaction() as session:
        if dataset_id is not None:
            datasets.ready(session, tenant(), dataset_id)  # locked, so that it is not deleted under the new job
        return submit(session, new, scans, services().settings.chunk_scans).id
