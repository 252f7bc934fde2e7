"""What comes in: these schemas check requests and describe them in the OpenAPI document."""

from typing import Any

import marshmallow as ma
from flask_smorest.fields import Upload
from marshmallow import fields, validate
from werkzeug.datastructures import FileStorage

from api.http.fields import VERSION, Base64, Boolean, HttpUrl, ImageOrScanId, Metadata, Time, words
from api.resources.jobs.explanations import Explain
from api.resources.training_params import ParamsSchema
from jobs.keys import Scope
from jobs.states import JobKind, JobState, Lane, ResultState

BIGINT = 2**63 - 1
MAX_SCANS = 10_000
"""Most scans in one request."""
SOURCES = ("file", "scan_id", "url")
"""What says which scan a manifest's row means."""
MANIFEST = (
    "CSV with a header row (comma, semicolon or tab), or NDJSON; UTF-8. Each row has exactly one of `file` (a file in "
    "the same body or zip), `scan_id` and `url`, and may have `custom_id`, `patient` and `study`."
)


class File(Upload):
    """A file of a multipart body."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> FileStorage:
        if not isinstance(value, FileStorage):
            raise ma.ValidationError("Send it as a file, with a file name.")
        return value


class ModelChoice(fields.String):
    """`champion`, or a version's number as text."""

    def __init__(self, **kwargs: Any) -> None:
        metadata = {"example": "champion", "pattern": VERSION.pattern}
        super().__init__(validate=_names_a_version, metadata=metadata, **kwargs)


def _names_a_version(value: str) -> None:
    if not VERSION.fullmatch(value):
        raise ma.ValidationError("Must be `champion` or a version's number.")


# --- requests: training ---


class TrainRequest(ma.Schema):
    """A training on a stored dataset, or on one to be fetched."""

    dataset_id = fields.UUID()
    source_url = HttpUrl()
    params = fields.Nested(ParamsSchema, unknown=ma.RAISE)
    name = fields.String(validate=validate.Length(1, 200))
    promote = fields.String(validate=validate.OneOf(["auto", "never"]), load_default="auto")
    lane = fields.String(validate=validate.OneOf([str(Lane.TRAIN)]), load_default=str(Lane.TRAIN))
    metadata = Metadata(load_default=dict)

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        _exactly_one(data, "dataset_id", "source_url")


def _exactly_one(data: dict[str, Any], *names: str) -> None:
    given = [name for name in names if name in data]
    if len(given) != 1:
        raise ma.ValidationError(f"Give exactly one of {', '.join(names)}.", given[-1] if given else names[0])


# --- requests: predictions ---


class _Prediction(ma.Schema):
    model = ModelChoice()
    precision = fields.String(
        validate=validate.OneOf(["auto", "fp32", "bf16", "int8"]),
        metadata={"description": "auto: the fastest that this network was admitted for, and that the worker has."},
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
        _exactly_one(data, "image", "scan_id")


class PredictUpload(_Prediction):
    """One scan as a file."""

    file = File(required=True)
    custom_id = fields.String(validate=validate.Length(1, 200))


class _CustomIds(_Prediction):
    custom_ids = fields.List(fields.String(validate=validate.Length(1, 200)))


class BatchJson(_CustomIds):
    """Scans that are stored already, all of a dataset, or a whole upload: one scan, or one zip of them.

    `custom_ids` follow the order of `scan_ids`.
    """

    scan_ids = fields.List(fields.UUID(), validate=validate.Length(1, MAX_SCANS))
    dataset_id = fields.UUID()
    upload_id = fields.UUID()

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        _exactly_one(data, "scan_ids", "dataset_id", "upload_id")
        if "custom_ids" in data and len(data["custom_ids"]) != len(data.get("scan_ids", ())):
            raise ma.ValidationError("Must be as many as scan_ids.", "custom_ids")


class BatchUpload(_CustomIds):
    """Many files, or one zip of them. `custom_ids` follow the order of the files, unless a manifest says all."""

    files: Any = fields.List(File(), validate=validate.Length(1, MAX_SCANS))
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

    manifest = File(required=True)


class ManifestRow(ma.Schema):
    """One scan of a manifest: a file that came with it, a stored scan, or an address to fetch it from."""

    file = fields.String(validate=validate.Length(1, 1000))
    scan_id = fields.UUID()
    url = HttpUrl()
    custom_id = fields.String(validate=validate.Length(1, 200))
    patient = fields.String(validate=validate.Length(1, 200))
    study = fields.String(validate=validate.Length(1, 200))

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        _exactly_one(data, *SOURCES)


# --- requests: the rest ---


class DatasetUpload(ma.Schema):
    """A zip with one folder a class."""

    file = File(required=True)
    name = fields.String(validate=validate.Length(1, 200))


class TruthsChoice(ma.Schema):
    """Which truths: all, or those told since a time, or of one version's predictions."""

    since = Time()
    model = ModelChoice()


class DatasetJson(ma.Schema):
    """A whole upload of such a zip; or scans whose truth is known, each in the folder of its class."""

    upload_id = fields.UUID()
    truths = fields.Nested(TruthsChoice, unknown=ma.RAISE)
    name = fields.String(validate=validate.Length(1, 200))

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        _exactly_one(data, "upload_id", "truths")


class ScanUpload(ma.Schema):
    """One image or DICOM file."""

    file = File(required=True)


class ScanJson(ma.Schema):
    """One image or DICOM file in base64."""

    image = Base64(required=True)


class KnownRequest(ma.Schema):
    """SHA-256 of files, in hex."""

    sha256 = fields.List(
        fields.String(validate=validate.Regexp(r"\A[0-9a-f]{64}\Z", error="Must be 64 lower-case hex digits.")),
        required=True,
        validate=validate.Length(max=MAX_SCANS),
    )


class Reason(fields.String):
    """Why somebody changes the champion; it is kept with the change."""

    def __init__(self) -> None:
        checks = [validate.Length(max=1000), validate.Regexp(r"\s*\S", error="Must not be blank.")]
        super().__init__(validate=checks, load_default=None, allow_none=True)


class PromoteRequest(ma.Schema):
    """A new champion; with `force` also against the gate, and then with a reason."""

    force = Boolean(load_default=False)
    reason = Reason()

    @ma.validates_schema
    def _force_has_reason(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["force"] and data["reason"] is None:
            raise ma.ValidationError("Say why the gate is passed over.", "reason")


class RollbackRequest(ma.Schema):
    """The champion before, back again."""

    reason = Reason()


class CompareQuery(ma.Schema):
    """Which two versions to compare."""

    a = ModelChoice(required=True)
    b = ModelChoice(required=True)


class KeyRequest(ma.Schema):
    """A new key."""

    name = fields.String(required=True, validate=validate.Length(1, 200))
    scopes = fields.List(fields.String(validate=words(Scope)), required=True, validate=validate.Length(1, 4))


class PageQuery(ma.Schema):
    """A page of a list in the order of its ids."""

    limit = fields.Integer(load_default=50, validate=validate.Range(1, 100))
    after = fields.UUID(load_default=None, metadata={"description": "`next` of the page before."})


class JobsQuery(PageQuery):
    """Which jobs to list."""

    state = fields.String(validate=words(JobState))
    kind = fields.String(validate=words(JobKind))
    created_after = Time()
    metadata = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Labels that the job must carry: `metadata[study]=7`."},
    )


class NumberedQuery(ma.Schema):
    """A page of a list in the order of its numbers."""

    limit = fields.Integer(load_default=100, validate=validate.Range(1, 100))
    after = fields.Integer(load_default=None, validate=validate.Range(0, BIGINT))


class NamedQuery(ma.Schema):
    """A page of a list in the order of its names."""

    limit = fields.Integer(load_default=100, validate=validate.Range(1, 100))
    after = fields.String(load_default="", metadata={"description": "`next` of the page before."})


class ResultsQuery(NumberedQuery):
    """Which results to list: without `state`, those that have ended."""

    after = fields.Integer(load_default=None, validate=validate.Range(0, 2**31 - 1))
    state = fields.String(load_default=None, validate=words(ResultState))
