"""Jobs: submit, list, show, follow, cancel, retry, reproduce, delete."""

import uuid
from typing import Any

from flask import Response, after_this_request

from api.http import waiting
from api.http.auth import needs
from api.http.bodies import Blueprint, OneOf, accepts_body
from api.http.context import principal, quota, services, tenant, transaction
from api.http.idempotency import idempotent, key
from api.http.paging import NamedQuery, NumberedQuery
from api.http.responses import BINARY, BYTES, CSV, HTML, JSON, NDJSON, PDF, PNG, SSE, TEXT, download, negotiate
from api.http.versioning import address
from api.resources.deletions import Accepted, DeletionSchema, accepted
from api.resources.jobs import events, results, studies, summaries
from api.resources.jobs.events import EventsPage
from api.resources.jobs.predict import (
    BatchJson,
    BatchManifest,
    BatchUpload,
    PredictJson,
    PredictUpload,
    predict_many,
    predict_one,
)
from api.resources.jobs.results import ResultsQuery
from api.resources.jobs.schemas import (
    DELETE,
    ArtifactsPage,
    DeleteQuery,
    JobSchema,
    JobsPage,
    JobsQuery,
    MetricsSchema,
)
from api.resources.jobs.train import TrainRequest, train_one
from jobs.deletions import of_jobs
from jobs.keys import Scope
from jobs.models import registry, reproduction
from jobs.paging import Page
from jobs.queue import lifecycle, pace, submission
from jobs.results import queries
from jobs.results import studies as answers
from jobs.results.job_filter import JobFilter
from jobs.results.study_answers import StudyAnswer
from jobs.results.summary import Summary, summary
from jobs.states import JobKind, Lane
from jobs.tables import Artifact, Json

blueprint = Blueprint("jobs", __name__, url_prefix="/jobs", description="Trainings and predictions.")

ARTIFACT_CONTENT = {
    **{kind: {"schema": BINARY} for kind in (PDF, PNG)},
    **{kind: {"schema": TEXT} for kind in (HTML, CSV, "application/yaml")},
    JSON: {"schema": {}},
    "*/*": {"schema": BINARY},
}
"""What artifacts are, by their names; those of a pipeline that was installed may be anything."""
SUBMIT = {JobKind.TRAIN: train_one, JobKind.PREDICT: predict_one, JobKind.PREDICT_BATCH: predict_many}
JSON_JOB = OneOf({JobKind.TRAIN: TrainRequest, JobKind.PREDICT: PredictJson, JobKind.PREDICT_BATCH: BatchJson})
UPLOADED_JOB = OneOf({JobKind.PREDICT: PredictUpload, JobKind.PREDICT_BATCH: BatchUpload})


@blueprint.route("", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=JSON_JOB, multipart=UPLOADED_JOB)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="createJob")
@idempotent(waiting.accepted)
def create_job(body: dict[str, Any]) -> waiting.Answer:
    """Train a network, classify one scan, or many, as `kind` says."""
    job_id = SUBMIT[body["kind"]](body)
    body.clear()  # free its image before waiting
    return waiting.accepted(job_id)


@blueprint.route("/train", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=TrainRequest)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="train")
@idempotent(waiting.accepted)
def train(body: dict[str, Any]) -> waiting.Answer:
    """Train a network on a dataset."""
    return waiting.accepted(train_one(body))


@blueprint.route("/predict", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=PredictJson, multipart=PredictUpload)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="predict")
@idempotent(waiting.accepted)
def predict(body: dict[str, Any]) -> waiting.Answer:
    """Classify one scan."""
    job_id = predict_one(body)
    body.clear()  # free its image before waiting
    return waiting.accepted(job_id)


@blueprint.route("/predict/batch", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=BatchJson, multipart=BatchUpload, manifest=BatchManifest)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="predictBatch")
@idempotent(waiting.accepted)
def predict_batch(body: dict[str, Any]) -> waiting.Answer:
    """Classify many scans."""
    return waiting.accepted(predict_many(body))


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.arguments(JobsQuery, location="query")
@blueprint.response(200, JobsPage)
@blueprint.alt_response(304, description="The client has this page.", success=True)
@blueprint.doc(operationId="listJobs")
def list_jobs(query: dict[str, Any]) -> Page[queries.JobView]:
    """List jobs, newest first."""
    after_this_request(waiting.make_conditional)
    limit, after = query.pop("limit"), query.pop("after")
    with transaction() as session:
        return queries.jobs(session, tenant(), JobFilter(**query), limit, after)


@blueprint.route("/<id:job_id>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, JobSchema)
@blueprint.alt_response(304, description="The client has this revision.", success=True)
@blueprint.doc(operationId="getJob")
def get_job(job_id: uuid.UUID) -> waiting.Answer | Response:
    """Show a job; with `Prefer: wait=N`, at its end, or with `If-None-Match` once it has changed."""
    return waiting.conditional_job(job_id)


@blueprint.route("/<id:job_id>", methods=["DELETE"])
@needs(Scope.JOBS_WRITE)
@blueprint.arguments(DeleteQuery, location="query")
@blueprint.response(202, DeletionSchema)
@blueprint.doc(operationId="deleteJob")
def delete_job(query: dict[str, Any], job_id: uuid.UUID) -> Accepted:
    """Delete an ended job, and its scans that nothing else needs. The receipt says what went."""
    return accepted(of_jobs.delete_job, job_id, with_scans=query["scans"] == DELETE)


@blueprint.route("/<id:job_id>/metrics")
@needs(Scope.JOBS_READ)
@blueprint.response(200, MetricsSchema)
@blueprint.doc(operationId="getJobMetrics")
def get_metrics(job_id: uuid.UUID) -> dict[str, Any]:
    """Show a training's epochs so far, and its final metrics."""
    with transaction() as session:
        view = queries.job(session, tenant(), job_id)
        return {"epochs": queries.epochs(session, job_id), "final": view.job.metrics}


@blueprint.route("/<id:job_id>/results")
@needs(Scope.JOBS_READ)
@blueprint.arguments(ResultsQuery, location="query")
@blueprint.response(200, results.ResultsPage)
@blueprint.alt_response(200, schema=TEXT, content_type=NDJSON, success=True)
@blueprint.alt_response(200, schema=TEXT, content_type=CSV, success=True)
@blueprint.doc(operationId="listResults")
def list_results(query: dict[str, Any], job_id: uuid.UUID) -> tuple[Page[Json], int, dict[str, str]] | Response:
    """List a prediction's results so far; as NDJSON or CSV, stream them to the job's end."""
    kind = negotiate(NDJSON, CSV)
    with transaction() as session:
        view = queries.job(session, tenant(), job_id)
        if kind == JSON:
            found = results.to_page(session, view, queries.results(session, view, **query), address(f"/jobs/{job_id}"))
    if kind != JSON:
        return results.stream_results(view, kind, query["state"], query["after"])
    return found, 200, {"Retry-After": "1"} if len(found.data) < query["limit"] and found.has_more else {}


@blueprint.route("/<id:job_id>/studies")
@needs(Scope.JOBS_READ)
@blueprint.arguments(studies.StudiesQuery, location="query")
@blueprint.response(200, studies.StudiesPage)
@blueprint.alt_response(200, schema=TEXT, content_type=NDJSON, success=True)
@blueprint.alt_response(200, schema=TEXT, content_type=CSV, success=True)
@blueprint.doc(operationId="listStudies")
def list_studies(query: dict[str, Any], job_id: uuid.UUID) -> tuple[Page[StudyAnswer], int, dict[str, str]] | Response:
    """List one answer for each study, or each patient, of an ended prediction; as NDJSON or CSV, wait for its end."""
    kind = negotiate(NDJSON, CSV)
    with transaction() as session:
        view = queries.job(session, tenant(), job_id)
        found = answers.studies(session, view, services().settings, **query)
    if kind != JSON:
        return studies.stream_studies(view, kind, query["by"], query["after"])
    return found, 200, {} if view.terminal else {"Retry-After": "1"}


@blueprint.route("/<id:job_id>/summary")
@needs(Scope.JOBS_READ)
@blueprint.response(200, summaries.SummarySchema)
@blueprint.alt_response(200, schema=BINARY, content_type=PNG, success=True)
@blueprint.doc(operationId="getSummary")
def get_summary(job_id: uuid.UUID) -> Summary | Response:
    """Summarize a prediction's results so far: classes, confidences, errors; as image/png, a chart of them."""
    with transaction() as session:
        view = queries.job(session, tenant(), job_id)
        found = summary(session, view)
    return summaries.summary_response(view, found)


@blueprint.route("/<id:job_id>/events")
@needs(Scope.JOBS_READ)
@blueprint.arguments(NumberedQuery, location="query")
@blueprint.response(200, EventsPage)
@blueprint.alt_response(200, schema=TEXT, content_type=SSE, success=True)
@blueprint.doc(operationId="listEvents")
def list_events(query: dict[str, Any], job_id: uuid.UUID) -> Page[Any] | Response:
    """List a job's events; as text/event-stream, follow them to its end."""
    waiting.job(job_id)
    if negotiate(SSE) == SSE:
        return events.stream_events(job_id)
    with transaction() as session:
        return queries.events(session, job_id, query["limit"], query["after"] or 0)


@blueprint.route("/<id:job_id>/artifacts")
@needs(Scope.JOBS_READ)
@blueprint.arguments(NamedQuery, location="query")
@blueprint.response(200, ArtifactsPage)
@blueprint.doc(operationId="listArtifacts")
def list_artifacts(query: dict[str, Any], job_id: uuid.UUID) -> Page[Artifact]:
    """List the files that a job made, by name."""
    with transaction() as session:
        queries.job(session, tenant(), job_id)
        return queries.artifacts(session, job_id, **query)


@blueprint.route("/<id:job_id>/artifacts/<path:name>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, BINARY, content_type=BYTES)
@blueprint.alt_response(304, description="The client has these bytes.", success=True)
@blueprint.doc(operationId="getArtifact", responses={200: {"content": ARTIFACT_CONTENT}})
def get_artifact(job_id: uuid.UUID, name: str) -> Response:
    """Download a file that a job made."""
    with transaction() as session:
        queries.job(session, tenant(), job_id)
        found = queries.artifact(session, job_id, name)
    return download(found.sha256, name.rpartition("/")[2], found.media_type)


@blueprint.route("/<id:job_id>/cancel", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, JobSchema)
@blueprint.doc(operationId="cancelJob")
def cancel_job(job_id: uuid.UUID) -> waiting.Answer:
    """Request a job's cancellation."""
    with transaction() as session:
        lifecycle.cancel(session, tenant(), job_id)
    view = waiting.job(job_id)
    return view, 202, {"Location": address(f"/jobs/{job_id}"), "Retry-After": "1"}


@blueprint.route("/<id:job_id>/retry", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="retryJob")
@idempotent(waiting.accepted)
def retry_job(job_id: uuid.UUID) -> waiting.Answer:
    """Submit what failed or was cancelled as a new job. A repeated request returns the same new job."""
    with transaction() as session:
        chunk = pace.chunk_size(session, Lane.BATCH, services().settings)
        new = submission.retry(session, tenant(), job_id, chunk, quota())
        registry.require_files_of(session, new, services().blobs)
    return waiting.accepted(new.id)


@blueprint.route("/<id:job_id>/reproduce", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, JobSchema)
@blueprint.alt_response(200, schema=JobSchema, description="With Prefer: wait, the finished job.", success=True)
@blueprint.doc(operationId="reproduceJob")
@idempotent(waiting.accepted)
def reproduce_job(job_id: uuid.UUID) -> waiting.Answer:
    """Repeat a succeeded training as a new job, which reports whether the metrics match."""
    with transaction() as session:
        new = reproduction.reproduce(session, tenant(), job_id, quota(), principal().key_id, key())
        registry.require_files_of(session, new, services().blobs)
    return waiting.accepted(new.id)
