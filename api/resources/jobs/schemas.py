"""Schemas of jobs and of the files that they make."""

import marshmallow as ma
from marshmallow import fields

from api.http.context import services
from api.http.fields import Answer, Metadata, Part, Time, links_schema, one_of
from api.http.paging import PageQuery, PageSchema
from api.http.pipelines.fields import PipelineName
from api.http.versioning import address
from api.resources.models.schemas import DriftedSchema
from jobs.results.links import ALWAYS, SOMETIMES, job_links
from jobs.results.queries import JobView
from jobs.states import JobKind, JobState
from jobs.tables import Job, Json


class JobsQuery(PageQuery):
    """Which jobs to list."""

    state = fields.String(validate=one_of(JobState))
    kind = fields.String(validate=one_of(JobKind))
    pipeline = PipelineName()
    created_after = Time()
    custom_id = fields.String(
        validate=ma.validate.Length(1, 200),
        metadata={"description": "Predictions with a scan that the client has given this id."},
    )
    metadata = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        metadata={"description": "Labels that the job must have: `metadata[study]=7`."},
    )


DELETE, KEEP = "delete", "keep"


class DeleteQuery(ma.Schema):
    """What is deleted with a job."""

    scans = fields.String(
        load_default=DELETE,
        validate=ma.validate.OneOf([DELETE, KEEP]),
        metadata={"description": "Its scans that no other result and no feedback needs: deleted with it, or kept."},
    )


class StageSchema(ma.Schema):
    """One stage of a training."""

    name = fields.String()
    state = fields.String()
    started_at = fields.String(allow_none=True)
    finished_at = fields.String(allow_none=True)


class ErrorSchema(ma.Schema):
    """Error of a job or of one scan."""

    code = fields.String(required=True)
    detail = fields.String(required=True)
    retryable = fields.Boolean(
        metadata={"description": "Whether another attempt may succeed. Attempts up to the limit were made already."}
    )


class CountsSchema(Answer):
    """Scans (or, of a training, the job itself) by outcome."""

    total = fields.Integer()
    succeeded = fields.Integer()
    failed = fields.Integer()
    cancelled = fields.Integer()
    pending = fields.Integer()


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


DRIFTED = "Of a prediction by the champion: on which day its predictions had drifted from its test scans. Else null."


JobLinks = links_schema("JobLinks", ("self", *ALWAYS), (*SOMETIMES, "mlflow"))
ArtifactLinks = links_schema("ArtifactLinks", ("self",))


class PinnedPointSchema(ma.Schema):
    """From which probability of the positive classes together on a scan of this prediction is positive."""

    positive = fields.List(fields.String())
    threshold = fields.Float()


class JobSchema(Answer):
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
    counts = Part(CountsSchema, lambda view: counts(view))
    params = fields.Dict(attribute="job.params")
    dataset_id = fields.UUID(attribute="job.dataset_id", allow_none=True)
    test_dataset_id = fields.UUID(attribute="job.test_dataset_id", allow_none=True)
    retry_of = fields.UUID(attribute="job.retry_of", allow_none=True)
    reproduction_of = fields.UUID(attribute="job.reproduction_of", allow_none=True)
    reproduction = fields.Nested(ReproductionSchema, attribute="job.reproduction", allow_none=True)
    model_version = fields.String(attribute="job.model_version", allow_none=True)
    operating_point = fields.Nested(
        PinnedPointSchema,
        attribute="job.operating_point",
        allow_none=True,
        metadata={"description": "Its model's at submission; null: a training, or a model without positive classes."},
    )
    model_drift = fields.Nested(DriftedSchema, allow_none=True, metadata={"description": DRIFTED})
    metrics = fields.Dict(attribute="job.metrics", allow_none=True)
    error = Part(
        ErrorSchema,
        lambda view: error(view.job),
        allow_none=True,
        metadata={
            "description": "Why it failed, or why a cancelled job had failed in part. Else null: see `warnings`."
        },
    )
    warnings = Part(
        ErrorSchema,
        lambda view: warnings(view.job),
        many=True,
        metadata={"description": "What went wrong or was passed over without failing a scan."},
    )
    metadata = Metadata(attribute="job.labels")
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
    links = Part(JobLinks, lambda view: links(view.job))


FAILED = (JobState.FAILED, JobState.CANCELLED)


def error(job: Job) -> Json | None:
    """The error of a job that failed, or was cancelled after a failure."""
    return job.error if job.state in FAILED else None


def warnings(job: Job) -> list[Json]:
    """What went wrong without failing a scan, so far. Jobs of earlier releases have it as their error."""
    found = job.warnings or []
    return found if job.state in FAILED or job.error is None or job.error in found else [job.error, *found]


def counts(view: JobView) -> dict[str, int]:
    """The fields of CountsSchema."""
    job = view.job
    ended = {"succeeded": job.succeeded, "failed": job.failed, "cancelled": job.cancelled}
    return {"total": job.total, **ended, "pending": view.pending}


def links(job: Job) -> dict[str, str]:
    """URLs of a job."""
    found = job_links(job, address(""))
    mlflow = services().settings.mlflow_public_url.rstrip("/")
    return {**found, "mlflow": f"{mlflow}/#/runs/{job.mlflow_run_id}"} if mlflow and job.mlflow_run_id else found


class JobsPage(PageSchema):
    """Jobs, newest first."""

    data = fields.List(fields.Nested(JobSchema), required=True)


class MetricsSchema(ma.Schema):
    """A training's epochs so far, and its metrics on held-out scans at the end."""

    epochs = fields.List(fields.Dict(), required=True)
    final = fields.Dict(required=True, allow_none=True)


class ArtifactSchema(Answer):
    """A file made by a job."""

    name = fields.String()
    size = fields.Integer()
    sha256 = fields.String()
    media_type = fields.String()
    created_at = Time()
    links = Part(ArtifactLinks, lambda row: {"self": address(f"/jobs/{row.job_id}/artifacts/{row.name}")})


class ArtifactsPage(PageSchema):
    """A job's artifacts by name."""

    data = fields.List(fields.Nested(ArtifactSchema), required=True)
