"""Schemas of jobs and of the files that they make."""

import marshmallow as ma
from marshmallow import fields

from api.http.context import services
from api.http.fields import Time, one_of
from api.http.paging import PageQuery, PageSchema
from api.http.pipeline_fields import PipelineName
from jobs.states import JobKind, JobState
from jobs.tables import Job


class JobsQuery(PageQuery):
    """Which jobs to list."""

    state = fields.String(validate=one_of(JobState))
    kind = fields.String(validate=one_of(JobKind))
    pipeline = PipelineName()
    created_after = Time()
    metadata = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Labels that the job must have: `metadata[study]=7`."},
    )


class StageSchema(ma.Schema):
    """One stage of a training."""

    name = fields.String()
    state = fields.String()
    started_at = fields.String(allow_none=True)
    finished_at = fields.String(allow_none=True)


class ErrorSchema(ma.Schema):
    """Error of a job or of one scan."""

    code = fields.String()
    detail = fields.String()
    retryable = fields.Boolean(
        metadata={"description": "Whether another attempt may succeed. Attempts up to the limit were made already."}
    )


class WarningSchema(ma.Schema):
    """What was noticed about a job and failed nothing."""

    code = fields.String()
    detail = fields.String()


class CountsSchema(ma.Schema):
    """Scans (or, of a training, the job itself) by outcome."""

    total = fields.Integer(attribute="job.total")
    succeeded = fields.Integer(attribute="job.succeeded")
    failed = fields.Integer(attribute="job.failed")
    cancelled = fields.Integer(attribute="job.cancelled")
    pending = fields.Integer(attribute="pending")


class RevisionSchema(ma.Schema):
    """Code revisions of a training and of its reproduction. `same` is false if either has uncommitted changes."""

    original = fields.String(allow_none=True)
    now = fields.String(allow_none=True)
    same = fields.Boolean()


class ReproductionSchema(ma.Schema):
    """Comparison of a reproduction with the original training. Differing values come as [original, now]."""

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
    pipeline = fields.String(attribute="job.pipeline")
    task = fields.String(attribute="job.task", metadata={"description": "What its model is for."})
    state = fields.String(attribute="job.state", validate=one_of(JobState))
    terminal = fields.Boolean()
    cancel_requested = fields.Function(
        lambda view: view.job.cancel_requested_at is not None, metadata={"type": "boolean"}
    )
    name = fields.String(attribute="job.name", allow_none=True)
    stage = fields.String(attribute="job.stage", allow_none=True)
    stages = fields.List(fields.Nested(StageSchema), attribute="job.stages")
    progress = fields.Float()
    eta_seconds = fields.Float(
        allow_none=True, metadata={"description": "Estimated seconds until the end; null: unknown."}
    )
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
    warnings = fields.List(
        fields.Nested(WarningSchema),
        attribute="job.warnings",
        metadata={"description": "What was noticed and failed no scan, such as files that were passed over."},
    )
    metadata = fields.Dict(attribute="job.labels")
    created_at = Time(attribute="job.created_at")
    started_at = Time(attribute="job.started_at", allow_none=True)
    finished_at = Time(attribute="job.finished_at", allow_none=True)
    results_expired_at = Time(attribute="job.results_expired_at", allow_none=True)
    device_seconds = fields.Float(attribute="job.device_seconds")
    scans_per_second = fields.Float(
        allow_none=True, metadata={"description": "Throughput of a prediction since it started."}
    )
    engines = fields.List(
        fields.String(),
        attribute="job.engines",
        metadata={"description": "Engines that computed a prediction's results."},
    )
    links = fields.Function(lambda view: links(view.job), metadata={"type": "object"})


LINKED = ("events", "artifacts", "cancel", "retry")
RESULTS = ("results", "summary")
LINKED_BY_KIND = {JobKind.TRAIN: ("metrics",), JobKind.PREDICT: RESULTS, JobKind.PREDICT_BATCH: RESULTS}


def links(job: Job) -> dict[str, str]:
    """URLs of a job."""
    own, special = f"/jobs/{job.id}", LINKED_BY_KIND.get(JobKind(job.kind), ())
    again = "reproduce" if (job.kind, job.state) == (JobKind.TRAIN, JobState.SUCCEEDED) else None
    found = {"self": own, **{name: f"{own}/{name}" for name in (*special, *LINKED, again) if name}}
    mlflow = services().settings.mlflow_public_url.rstrip("/")
    return {**found, "mlflow": f"{mlflow}/#/runs/{job.mlflow_run_id}"} if mlflow and job.mlflow_run_id else found


class JobsPage(PageSchema):
    """Jobs, newest first."""

    data = fields.List(fields.Nested(JobSchema), required=True)


class MetricsSchema(ma.Schema):
    """A training's epochs so far, and its metrics on held-out scans at the end."""

    epochs = fields.List(fields.Dict(), required=True)
    final = fields.Dict(required=True, allow_none=True)


class ArtifactSchema(ma.Schema):
    """A file made by a job."""

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
