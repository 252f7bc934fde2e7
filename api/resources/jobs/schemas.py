"""Schemas of jobs and of the files that they make."""

import marshmallow as ma
from marshmallow import fields

from api.http.context import services
from api.http.fields import Time, one_of
from api.http.paging import PageQuery, PageSchema
from jobs.states import JobKind, JobState
from jobs.tables import Job


class JobsQuery(PageQuery):
    """Which jobs to list."""

    state = fields.String(validate=one_of(JobState))
    kind = fields.String(validate=one_of(JobKind))
    created_after = Time()
    metadata = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Labels that the job must carry: `metadata[study]=7`."},
    )


class StageSchema(ma.Schema):
    """One stage of a training."""

    name = fields.String()
    state = fields.String()
    started_at = fields.String(allow_none=True)
    finished_at = fields.String(allow_none=True)


class ErrorSchema(ma.Schema):
    """Why a job, or one scan of it, failed."""

    code = fields.String()
    detail = fields.String()
    retryable = fields.Boolean(
        metadata={"description": "The same work may go well if it is done again; it was, up to the limit, already."}
    )


class CountsSchema(ma.Schema):
    """Parts of a job by how they ended."""

    total = fields.Integer(attribute="job.total")
    succeeded = fields.Integer(attribute="job.succeeded")
    failed = fields.Integer(attribute="job.failed")
    cancelled = fields.Integer(attribute="job.cancelled")
    pending = fields.Integer(attribute="pending")


class RevisionSchema(ma.Schema):
    """The code of a training and of its reproduction. `same` is false where either has uncommitted changes."""

    original = fields.String(allow_none=True)
    now = fields.String(allow_none=True)
    same = fields.Boolean()


class ReproductionSchema(ma.Schema):
    """How a reproduction compares with the training that it repeats. What differs comes as [original, now]."""

    of = fields.UUID()
    revision = fields.Nested(RevisionSchema)
    same_environment = fields.Boolean(metadata={"description": "Versions of Python and packages, machine, device."})
    environment_differences = fields.Dict(keys=fields.String(), values=fields.List(fields.Raw()))
    same_dataset = fields.Boolean()
    matches = fields.Boolean(metadata={"description": "No metric differs by more than the tolerance."})
    tolerance = fields.Float()
    differences = fields.Dict(keys=fields.String(), values=fields.List(fields.Float(allow_none=True)))


class JobSchema(ma.Schema):
    """A job. `terminal` says whether it has ended; `progress` runs from 0 to 1."""

    id = fields.UUID(attribute="job.id")
    kind = fields.String(attribute="job.kind", validate=one_of(JobKind))
    state = fields.String(attribute="job.state", validate=one_of(JobState))
    terminal = fields.Boolean()
    cancel_requested = fields.Function(
        lambda view: view.job.cancel_requested_at is not None, metadata={"type": "boolean"}
    )
    name = fields.String(attribute="job.name", allow_none=True)
    stage = fields.String(attribute="job.stage", allow_none=True)
    stages = fields.List(fields.Nested(StageSchema), attribute="job.stages")
    progress = fields.Float()
    eta_seconds = fields.Float(allow_none=True, metadata={"description": "Seconds until its end, as far as known."})
    queue_position = fields.Integer(
        allow_none=True,
        metadata={"description": "Waiting jobs that are served before this one; 1000 means 1000 or more."},
    )
    attempt = fields.Integer(attribute="job.attempt")
    counts = fields.Function(lambda view: CountsSchema().dump(view), metadata={"type": "object"})
    params = fields.Dict(attribute="job.params")
    dataset_id = fields.UUID(attribute="job.dataset_id", allow_none=True)
    retry_of = fields.UUID(attribute="job.retry_of", allow_none=True)
    reproduction_of = fields.UUID(attribute="job.reproduction_of", allow_none=True)
    reproduction = fields.Nested(ReproductionSchema, attribute="job.reproduction", allow_none=True)
    model_version = fields.String(attribute="job.model_version", allow_none=True)
    metrics = fields.Dict(attribute="job.metrics", allow_none=True)
    error = fields.Nested(ErrorSchema, attribute="job.error", allow_none=True)
    metadata = fields.Dict(attribute="job.labels")
    created_at = Time(attribute="job.created_at")
    started_at = Time(attribute="job.started_at", allow_none=True)
    finished_at = Time(attribute="job.finished_at", allow_none=True)
    results_expired_at = Time(attribute="job.results_expired_at", allow_none=True)
    device_seconds = fields.Float(attribute="job.device_seconds")
    scans_per_second = fields.Float(allow_none=True, metadata={"description": "A prediction's pace since it began."})
    engines = fields.List(
        fields.String(), attribute="job.engines", metadata={"description": "What computed a prediction's results."}
    )
    links = fields.Function(lambda view: links(view.job), metadata={"type": "object"})


LINKED = ("events", "artifacts", "cancel", "retry")
RESULTS = ("results", "summary")
LINKED_BY_KIND = {JobKind.TRAIN: ("metrics",), JobKind.PREDICT: RESULTS, JobKind.PREDICT_BATCH: RESULTS}


def links(job: Job) -> dict[str, str]:
    """A job's addresses."""
    own, special = f"/jobs/{job.id}", LINKED_BY_KIND.get(JobKind(job.kind), ())
    again = "reproduce" if (job.kind, job.state) == (JobKind.TRAIN, JobState.SUCCEEDED) else None
    found = {"self": own, **{name: f"{own}/{name}" for name in (*special, *LINKED, again) if name}}
    mlflow = services().settings.mlflow_public_url.rstrip("/")
    return {**found, "mlflow": f"{mlflow}/#/runs/{job.mlflow_run_id}"} if mlflow and job.mlflow_run_id else found


class JobsPage(PageSchema):
    """Jobs, newest first."""

    data = fields.List(fields.Nested(JobSchema), required=True)


class MetricsSchema(ma.Schema):
    """A training's epochs so far, and its metrics on held-out scans once it has them."""

    epochs = fields.List(fields.Dict(), required=True)
    final = fields.Dict(required=True, allow_none=True)


class ArtifactSchema(ma.Schema):
    """A file that a job made."""

    name = fields.String()
    size = fields.Integer()
    sha256 = fields.String()
    media_type = fields.String()
    created_at = Time()
    links = fields.Function(
        lambda row: {"self": f"/jobs/{row.job_id}/artifacts/{row.name}"}, metadata={"type": "object"}
    )


class ArtifactsPage(PageSchema):
    """A job's artifacts by name."""

    data = fields.List(fields.Nested(ArtifactSchema), required=True)
