"""One answer for each study, or each patient, of a prediction: pages of JSON, and streams of NDJSON and CSV."""

from collections.abc import Iterator
from typing import Any

import marshmallow as ma
from flask import Response
from marshmallow import fields, validate

from api.http.context import services, tenant
from api.http.fields import Answer, Time
from api.http.paging import NumberedQuery, PageSchema
from api.resources.jobs.results import ROWS, line, stream_pages
from jobs.paging import Page
from jobs.results import queries, studies
from jobs.results.queries import JobView
from jobs.results.studies import By
from jobs.results.study_answers import StudyAnswer
from jobs.tables import Json


class StudiesQuery(NumberedQuery):
    """Which answers to list."""

    after = fields.Integer(load_default=None, validate=validate.Range(queries.START, queries.MAX_ORDINAL))
    by = fields.String(load_default="study", validate=validate.OneOf(["study", "patient"]))


class DecidingSchema(ma.Schema):
    """A slice that decided the answer, and its probability of the answer's label."""

    ordinal = fields.Integer(required=True)
    frame = fields.Integer(allow_none=True)
    sop_uid = fields.String(allow_none=True)
    instance_number = fields.Integer(allow_none=True)
    position_mm = fields.Float(allow_none=True)
    probability = fields.Float(required=True)


class PoolingSchema(ma.Schema):
    """How the probabilities of the slices became one: `max`, `top` (the mean of the `k` highest) or `noisy_or`."""

    method = fields.String()
    k = fields.Integer()
    threshold = fields.Float(metadata={"description": "From here on the answer is positive."})
    chosen = fields.Boolean(metadata={"description": "On validation patients; else it is the default."})
    reason = fields.String()


class StudySchema(Answer):
    """What a prediction says of a study, or of a patient."""

    job_id = fields.UUID(attribute="job.id")
    model_version = fields.String(attribute="job.model_version", allow_none=True)
    finished_at = Time(attribute="job.finished_at", allow_none=True)
    study_uid = fields.String(allow_none=True, metadata={"description": "Null for several studies, and for none."})
    study_uids = fields.List(fields.String())
    study = fields.String(allow_none=True, metadata={"description": "The client's own key."})
    accession = fields.String(allow_none=True)
    patient = fields.String(allow_none=True)
    series_uids = fields.List(fields.String())
    label = fields.String(allow_none=True)
    confidence = fields.Float(allow_none=True)
    probabilities = fields.Dict(keys=fields.String(), values=fields.Float(), allow_none=True)
    disposition = fields.String(
        metadata={"description": "How it may be used: a class in lower case, `indeterminate` or `rejected`."}
    )
    reason = fields.String(allow_none=True, metadata={"description": "Reason why it is indeterminate or rejected."})
    slices = fields.Integer()
    used = fields.Integer(metadata={"description": "Slices that the answer is made of."})
    rejected = fields.Integer()
    failed = fields.Integer(metadata={"description": "Slices without a result."})
    deciding = fields.List(fields.Nested(DecidingSchema))
    ordinals = fields.List(
        fields.Integer(), metadata={"description": "Its results, in the order of the slices, series after series."}
    )
    pooling = fields.Nested(PoolingSchema)


class StudiesPage(PageSchema):
    """Answers, in the order of their first results."""

    data = fields.List(fields.Nested(StudySchema), required=True)


def stream_studies(view: JobView, kind: str, by: By, after: int | None) -> Response:
    """A response with all answers after the ordinal `after`, as NDJSON or CSV. It waits for a running job's end.

    Raises:
        NoResults, ResultsExpired, TooManyWatchers
    """
    sessions, settings, owner, job_id = services().sessions, services().settings, tenant(), view.job.id
    with sessions.begin() as session:
        studies.studies(session, view, settings, by, 1, after)  # raises before the response begins
        classes = queries.classes(session, view)

    def read(after: int | None) -> Page[StudyAnswer]:
        with sessions.begin() as session:
            return studies.studies(session, queries.job(session, owner, job_id), settings, by, ROWS, after)

    return stream_pages(view, kind, read, after, StudySchema(), lambda pages: _csv(pages, classes))


COLUMNS = (
    "study_uid", "study", "accession", "patient", "label", "confidence", "disposition", "reason", "slices", "used",
    "rejected", "failed", "deciding", "pooling", "model_version",
)  # fmt: skip
"""Behind them come the classes of the model."""


def _csv(pages: Iterator[list[Json]], classes: list[str]) -> Iterator[str]:
    yield line([*COLUMNS, *(f"probability_{name}" for name in classes)])
    for page in pages:
        yield "".join(line(_cells(row, classes)) for row in page) or "\r\n"


def _cells(row: Json, classes: list[str]) -> list[Any]:
    """`deciding`: the ordinals of the slices that decided."""
    deciding = " ".join(str(one["ordinal"]) for one in row["deciding"])
    own = row | {"deciding": deciding, "pooling": row["pooling"]["method"]}
    probabilities = row["probabilities"] or {}
    return [*(own[name] for name in COLUMNS), *(probabilities.get(name) for name in classes)]
