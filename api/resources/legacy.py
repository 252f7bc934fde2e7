"""Endpoints of three earlier API documents, for their clients.

Each submits a job like any other and, except for a training, waits for its end. A job that does not end in time goes
on, and the response names it.
"""

import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote

import marshmallow as ma
from flask import Response, abort, g, make_response, request
from marshmallow import fields, validate
from werkzeug.datastructures import FileStorage

from api.http import waiting
from api.http.auth import authenticated, needs, public
from api.http.bodies import Blueprint, accepts_body
from api.http.context import tenant, transaction
from api.http.fields import Base64, List, Time
from api.http.idempotency import idempotent
from api.http.pipelines.fields import spec_of
from api.http.problems import RETRY_SECONDS, InvalidFields, ProblemSchema, problem
from api.http.responses import BINARY, JSON, PNG, download
from api.http.versioning import only_at_the_root
from api.intake import scan_store
from api.resources.health import NO_DATABASE, impairments, not_ready_reasons
from api.resources.jobs.explanations import MISSING_NOTE
from api.resources.jobs.predict import predict_many, predict_one
from api.resources.jobs.schemas import JobSchema
from api.resources.jobs.train import TrainRequest, train_on_newest
from api.resources.scans import ScanJson, ScanUpload
from jobs.errors import ArtifactNotFound, BadInput, Conflict, ModelNotFound, NoChampion, TooLarge
from jobs.keys import Scope
from jobs.models import registry
from jobs.queue import explanations
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.states import JobKind, ResultState
from jobs.tables import Json, ModelVersion, ScanResult

DEPRECATED_AT = dt.datetime(2026, 11, 30, tzinfo=dt.UTC)
DEPRECATION = {
    "Deprecation": f"@{DEPRECATED_AT.timestamp():.0f}",  # RFC 9745
    "Link": '</docs/#/older>; rel="deprecation"; type="text/html"',
}

blueprint = Blueprint(
    "older",
    __name__,
    description="Endpoints of earlier API documents, at the root only. They wait for their job, 60 s at most. "
    "Instead of /train, /predict, /batch_predict and /explain use POST /v1/jobs; of /model-status GET "
    "/v1/models/champion; of /health GET /v1/health/ready.",
)
blueprint.before_request(only_at_the_root)


@blueprint.after_request
def _deprecate(response: Response) -> Response:
    response.headers.extend(DEPRECATION)
    return response


_older = partial(blueprint.doc, deprecated=True, servers=[{"url": "/"}])

MAX_IMAGES = 100
UNREADABLE = ("BAD_IMAGE", spec_of({}).inputs.refusal_code, TooLarge.code)
"""Error codes of results that failed because of the request."""
TRAIN_FIRST = "No model is champion yet. Train one first: POST /train."
LATE = "The job is not done yet, and goes on: its Location says how far it is. Or send the same again later."

DISPOSITION, UNKNOWN = "Renalq-Disposition", "unknown"
DISPOSITIONS = {
    DISPOSITION: {
        "schema": {"type": "string"},
        "description": "Disposition of each image in their order: its class in lower case, `indeterminate`, or "
        "`rejected` (its class must not be used). Comma-separated; non-ASCII characters are percent-encoded.",
    }
}

Predictions = tuple[list[Json], int, dict[str, str]]


class NewestTrainRequest(TrainRequest):
    """A training, by default on the newest ready dataset."""

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "dataset_id" in data and "source_url" in data:
            super()._one_source(data)


class ImagesJson(ma.Schema):
    """Images or DICOM files in base64."""

    images = List(Base64(), required=True, validate=validate.Length(1, MAX_IMAGES))


class FoundSchema(ma.Schema):
    """Prediction for an image."""

    image = fields.String(required=True, metadata={"description": "Its class, such as Normal or Tumor."})
    confidence = fields.Float(required=True)


class ModelReadySchema(ma.Schema):
    """The champion."""

    status = fields.String(required=True, validate=validate.OneOf(["ready"]))
    model_path = fields.String(required=True)
    model_version = fields.String(required=True)


class NoModelSchema(ma.Schema):
    """There is no champion."""

    status = fields.String(required=True, validate=validate.OneOf(["not_found"]))
    message = fields.String(required=True)


class ModelInfoSchema(ma.Schema):
    """The champion in short."""

    version = fields.String()
    classes = fields.List(fields.String())
    f1 = fields.Function(lambda version: version.metrics.get("f1"), metadata={"type": ["number", "null"]})
    promoted_at = Time(allow_none=True)


class OlderHealthSchema(ma.Schema):
    """Whether all is well (`degraded`: jobs are accepted and wait, or something else than jobs fails: `reasons`), and
    the champion."""

    status = fields.String(required=True, validate=validate.OneOf(["healthy", "degraded"]))
    reasons = fields.List(fields.String(), required=True)
    model = fields.Nested(
        ModelInfoSchema,
        required=True,
        allow_none=True,
        metadata={"description": "The tenant's champion; null without one, or without a key that may read it."},
    )


# --- waiting for a job's results ---


@contextmanager
def _submitting(body: dict[str, Any]) -> Iterator[None]:
    """Without a champion the response is 404. The body is emptied at the end: images are not kept during the wait."""
    try:
        yield
    except NoChampion:
        raise ModelNotFound(TRAIN_FIRST) from None
    finally:
        body.clear()


def _results(job_id: uuid.UUID) -> list[ScanResult]:
    """All results of the job, once it has succeeded. Otherwise, or after `MAX_WAIT`, the response links to the job.

    Raises:
        InvalidFields: images cannot be read.
        Conflict: the job was cancelled.
    """
    view = waiting.wait_for_end(job_id, waiting.MAX_WAIT)
    if not view.terminal:
        abort(problem(503, "NOT_DONE_YET", LATE, {"Retry-After": str(RETRY_SECONDS), **_location(job_id)}))
    with transaction() as session:
        results = list(queries.results(session, view, None, MAX_IMAGES).data)
    failed = [row for row in results if row.state != ResultState.SUCCEEDED]
    if failed:
        _refuse(view, failed)
    return results


def _refuse(view: JobView, failed: list[ScanResult]) -> NoReturn:
    errors = [(row.ordinal, row.error) for row in failed if row.error]
    unreadable = [
        (_pointer(view, ordinal), error["detail"]) for ordinal, error in errors if error["code"] in UNREADABLE
    ]
    if unreadable:
        raise InvalidFields(unreadable)
    error = view.job.error or failed[0].error
    if error is None:
        raise Conflict("The job was cancelled. Send the same again, with a new Idempotency-Key if it had one.")
    abort(problem(500, error["code"], error["detail"], _location(view.job.id)))


def _location(job_id: uuid.UUID) -> dict[str, str]:
    return {"Location": f"/jobs/{job_id}"}


def _pointer(view: JobView, ordinal: int) -> str:
    if view.job.kind == JobKind.PREDICT_BATCH:
        return f"/images/{ordinal}"
    return "/file" if request.files else "/image"


def _predictions(job_id: uuid.UUID) -> Predictions:
    results = _results(job_id)
    found = [{"image": row.label, "confidence": round(row.confidence or 0.0, 4)} for row in results]
    # The earlier documents fix the body, so a header says which scans were rejected.
    dispositions = (quote(row.disposition or UNKNOWN, safe=" ") for row in results)
    return found, 200, {DISPOSITION: ", ".join(dispositions)}


def _overlay(job_id: uuid.UUID) -> Response:
    _results(job_id)
    try:
        with transaction() as session:
            overlay = queries.artifact(session, job_id, explanations.artifact_name(0))
    except ArtifactNotFound:
        return problem(500, "NOT_EXPLAINED", MISSING_NOTE, _location(job_id))
    return download(overlay.sha256, "explanation.png", overlay.media_type)


# --- the endpoints ---


@blueprint.route("/train", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.doc(requestBody={"required": False})
@accepts_body(json=NewestTrainRequest)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@_older(operationId="olderTrain")
@idempotent(waiting.accepted)
def train(body: dict[str, Any]) -> waiting.Answer:
    """Train a network; by default on the newest ready dataset, with default parameters."""
    return waiting.accepted(train_on_newest(body))


@blueprint.route("/predict", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=ScanJson, multipart=ScanUpload)
@blueprint.response(200, FoundSchema(many=True), headers=DISPOSITIONS)
@blueprint.alt_response(503, schema=ProblemSchema, content_type="application/problem+json", description=LATE)
@_older(operationId="olderPredict")
@idempotent(_predictions)
def predict(body: dict[str, Any]) -> Predictions:
    """Classify one scan and wait for it: a list of one."""
    with _submitting(body):
        job_id = predict_one({**body, "metadata": {}})
    return _predictions(job_id)


@blueprint.route("/batch_predict", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=ImagesJson)
@blueprint.response(200, FoundSchema(many=True), headers=DISPOSITIONS)
@blueprint.alt_response(503, schema=ProblemSchema, content_type="application/problem+json", description=LATE)
@_older(operationId="olderBatchPredict")
@idempotent(_predictions)
def batch_predict(body: dict[str, Any]) -> Predictions:
    """Classify up to a hundred scans and wait for them. A file that is no image fails the whole request."""
    with _submitting(body):
        job_id = _batch(body["images"])
    return _predictions(job_id)


def _batch(images: list[FileStorage]) -> uuid.UUID:
    _refuse_unreadable(images)
    return predict_many({"files": images, "metadata": {}, "whole_files": True})  # as many answers as images


def _refuse_unreadable(images: list[FileStorage]) -> None:
    wrong = []
    for number, image in enumerate(images):
        try:
            scan_store.inspect_scan(image.stream, spec_of({}).inputs)
        except (BadInput, TooLarge) as error:
            wrong.append((f"/images/{number}", str(error)))
    if wrong:
        raise InvalidFields(wrong)


@blueprint.route("/explain", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=ScanJson, multipart=ScanUpload)
@blueprint.response(200, BINARY, content_type=PNG)
@blueprint.alt_response(503, schema=ProblemSchema, content_type="application/problem+json", description=LATE)
@_older(operationId="olderExplain")
@idempotent(_overlay)
def explain(body: dict[str, Any]) -> Response:
    """Show which parts of a scan its class was inferred from: the Grad-CAM overlay, as PNG."""
    with _submitting(body):
        job_id = predict_one({**body, "explain": True, "metadata": {}})
    return _overlay(job_id)


@blueprint.route("/model-status")
@needs(Scope.JOBS_READ)
@blueprint.response(200, ModelReadySchema)
@blueprint.alt_response(404, schema=NoModelSchema, content_type=JSON)
@_older(operationId="olderModelStatus")
def model_status() -> dict[str, str] | Response:
    """Show whether there is a champion."""
    found = _champion()
    if found is None:
        return make_response({"status": "not_found", "message": "Model needs to be trained"}, 404)
    return {
        "status": "ready",
        "model_path": f"/models/{found.version}/weights",
        "model_version": str(found.version),
    }


@blueprint.route("/health")
@public
@blueprint.response(200, OlderHealthSchema)
@_older(operationId="olderHealth", security=[{}, {"key": []}])
def health() -> dict[str, Any]:
    """Show whether jobs are being processed; with a key that may read, the champion too."""
    reasons = not_ready_reasons()
    if "Authorization" in request.headers and NO_DATABASE not in reasons:  # without a database no key can be checked
        g.principal = authenticated()
    reasons += impairments()
    may_read = "principal" in g and g.principal.may(Scope.JOBS_READ)
    return {
        "status": "degraded" if reasons else "healthy",
        "reasons": reasons,
        "model": _champion() if may_read else None,
    }


def _champion() -> ModelVersion | None:
    try:
        with transaction() as session:
            return registry.resolve(session, tenant(), registry.CHAMPION)
    except NoChampion:
        return None
