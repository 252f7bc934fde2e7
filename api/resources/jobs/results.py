"""A prediction's results: pages of JSON, and streams of NDJSON and CSV that follow the job to its end."""

import csv
import errno
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import marshmallow as ma
from flask import Response
from marshmallow import fields, validate
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.http import responses
from api.http.change_listener import Subscription
from api.http.context import holder, services, tenant
from api.http.fields import one_of
from api.http.paging import NumberedQuery, PageSchema
from api.http.responses import CSV
from api.http.versioning import address
from api.resources.jobs.explanations import ExplainedSchema, explanation_fields
from api.resources.jobs.schemas import ErrorSchema
from jobs.errors import RenalQError
from jobs.models import feedback
from jobs.paging import Page
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.results.study_answers import patient_of
from jobs.states import ResultState
from jobs.tables import Json, ScanResult

ROWS = 500
IDENTITY = ("study_uid", "series_uid", "sop_uid", "instance_number", "accession", "position_mm")
"""What a result shows of its identity beside the patient."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of cells that a spreadsheet would execute as formulas."""


class ResultsQuery(NumberedQuery):
    """Which results to list: without `state`, those that have ended."""

    after = fields.Integer(load_default=None, validate=validate.Range(queries.START, queries.MAX_ORDINAL))
    state = fields.String(load_default=None, validate=one_of(ResultState))


class ResultSchema(ExplainedSchema):
    """A prediction for one scan."""

    ordinal = fields.Integer(
        metadata={"description": "Its number in the job, from 0; as `after` it gives the results that follow."}
    )
    scan_id = fields.UUID(allow_none=True)
    name = fields.String(allow_none=True)
    custom_id = fields.String(allow_none=True)
    patient = fields.String(allow_none=True)
    study = fields.String(allow_none=True)
    frame = fields.Integer(metadata={"description": "Which of the file's frames or slices it is of, from 0."})
    study_uid = fields.String()
    series_uid = fields.String()
    sop_uid = fields.String()
    instance_number = fields.Integer()
    accession = fields.String()
    position_mm = fields.Float(
        metadata={"description": "Where the slice lies along the normal of its series: the order of its slices."}
    )
    state = fields.String(validate=one_of(ResultState))
    label = fields.String(allow_none=True)
    confidence = fields.Float(allow_none=True)
    probabilities = fields.Dict(keys=fields.String(), values=fields.Float(), allow_none=True)
    disposition = fields.String(
        allow_none=True,
        metadata={"description": "How it may be used: a class in lower case, `indeterminate` or `rejected`."},
    )
    reason = fields.String(allow_none=True, metadata={"description": "Reason why it is indeterminate or rejected."})
    ood_score = fields.Float(
        allow_none=True,
        metadata={"description": "Out-of-distribution score. Above 1 the scan is unlike the training scans."},
    )
    output = fields.Dict(metadata={"description": "Whatever else the pipeline answers for it."})
    truth = fields.String(metadata={"description": "The true class, once it was reported."})
    model_version = fields.String(allow_none=True)
    engine = fields.String(allow_none=True, metadata={"description": "Engine that computed it, such as openvino-bf16."})
    cached = fields.Boolean(
        metadata={"description": "Whether it was copied from an earlier result of the same scan, model and engine."}
    )
    error = fields.Nested(ErrorSchema)


class ResultsPage(PageSchema):
    """Predictions, in the order of the scans."""

    data = fields.List(fields.Nested(ResultSchema), required=True)


def to_page(session: Session, view: JobView, found: Page[ScanResult], job_url: str) -> Page[Json]:
    """Rows as a page of ResultSchema, with links to the explanations made so far, which begin with the job's own."""
    explained = explanation_fields(session, view, found.data, job_url)
    truths = feedback.labels(session, view.job.model_id, [row.scan_id for row in found.data])
    rows = [_result(view, row, truths.get(row.scan_id)) | explained.get(row.ordinal, {}) for row in found.data]
    return Page(rows, found.has_more, found.next)


def _result(view: JobView, row: ScanResult, truth: str | None) -> Json:
    version = view.job.model_version
    result: Json = {
        "ordinal": row.ordinal,
        "scan_id": row.scan_id,
        "name": row.name,
        "state": row.state,
        "label": row.label,
        "confidence": row.confidence,
        "probabilities": row.probabilities,
        "disposition": row.disposition,
        "reason": row.reason,
        "ood_score": row.ood_score,
        "model_version": None if version is None else str(version),
        "engine": row.engine,
        "cached": row.cached,
    }
    optional: Json = {"custom_id": row.custom_id, "patient": patient_of(row), "study": row.study, "truth": truth}
    optional |= {"error": row.error, "output": row.output, "frame": row.frame}
    optional |= {name: (row.identity or {}).get(name) for name in IDENTITY}
    return result | {name: value for name, value in optional.items() if value is not None}


def stream_results(view: JobView, kind: str, state: str | None, after: int | None) -> Response:
    """A response with all results that have ended (or are in `state`) after the ordinal `after`, as NDJSON or CSV. It
    follows a running job to its end.

    Raises:
        NoResults, ResultsExpired, TooManyWatchers
    """
    sessions, owner, job_id = services().sessions, tenant(), view.job.id
    with sessions.begin() as session:
        queries.results(session, view, state, 1, after)  # raises before the response begins
        classes = queries.classes(session, view)
    job_url = address(f"/jobs/{job_id}")  # now: the stream goes on without the request

    def read(after: int | None) -> Page[Json]:
        with sessions.begin() as session:
            now = queries.job(session, owner, job_id)  # the job first: if it has ended, all its results have
            return to_page(session, now, queries.results(session, now, state, ROWS, after), job_url)

    return stream_pages(view, kind, read, after, ResultSchema(), lambda pages: _csv(pages, classes))


def stream_pages(
    view: JobView,
    kind: str,
    read: "ReadPage",
    after: int | None,
    schema: ma.Schema,
    as_csv: Callable[[Iterator[list[Json]]], Iterator[str]],
) -> Response:
    """A response with all pages of a job, as NDJSON or CSV, to its end.

    Raises:
        TooManyWatchers
    """
    stack, listener = ExitStack(), services().listener
    subscription = None if view.terminal else stack.enter_context(listener.subscribe(view.job.id, holder()))
    pages = _pages_to_end(read, subscription, after, schema)
    return responses.stream(as_csv(pages) if kind == CSV else _ndjson(pages), kind, stack.close)


ReadPage = Callable[[int | None], Page[Any]]


def _pages_to_end(
    read: ReadPage, subscription: Subscription | None, after: int | None, schema: ma.Schema
) -> Iterator[list[Json]]:
    """Lists of rows until the job has ended; an empty one to keep the connection alive.

    Raises:
        OSError: the rows are not complete.
    """
    sent_at = time.monotonic()
    while True:
        try:
            found = read(after)
        except (SQLAlchemyError, RenalQError):
            raise _incomplete() from None
        if found.data:
            yield [schema.dump(row) for row in found.data]
            after, sent_at = int(found.next) if found.next else after, time.monotonic()
        if not found.has_more:
            return
        if subscription is not None and len(found.data) < ROWS:
            if subscription.closed:
                raise _incomplete()
            subscription.wait(responses.KEEP_ALIVE_SECONDS)
        if time.monotonic() - sent_at >= responses.KEEP_ALIVE_SECONDS:
            yield []
            sent_at = time.monotonic()


def _incomplete() -> OSError:
    """The error that ends a response so that the client notices: gunicorn takes it for a lost connection, and closes
    without the last chunk."""
    return OSError(errno.ECONNRESET, "The results are not whole: go on with `after`.")


def _ndjson(pages: Iterator[list[Json]]) -> Iterator[str]:
    for page in pages:
        yield "".join(json.dumps(row) + "\n" for row in page) or "\n"


COLUMNS = (
    "scan_id", "name", "custom_id", "patient", "study", "state", "label", "confidence", "model_version", "engine",
    "cached", "explanation", "ordinal",
    "disposition", "reason", "ood_score", "truth", "heatmap", "explanation_note",
    "study_uid", "series_uid", "sop_uid", "instance_number", "accession", "position_mm", "frame",
)  # fmt: skip
"""Some clients read columns by position, so new ones come last. Behind them come the classes of the model."""


def _csv(pages: Iterator[list[Json]], classes: list[str]) -> Iterator[str]:
    yield line([*COLUMNS, *(f"probability_{name}" for name in classes), "error_code", "error_detail"])
    for page in pages:
        yield "".join(line(_cells(row, classes)) for row in page) or "\r\n"


def _cells(row: Json, classes: list[str]) -> list[Any]:
    probabilities, error = row["probabilities"] or {}, row.get("error") or {}
    own = [row.get(name) for name in COLUMNS]
    return [*own, *(probabilities.get(name) for name in classes), error.get("code"), error.get("detail")]


def line(cells: list[Any]) -> str:
    """A line of a CSV, without cells that a spreadsheet would run."""
    text = io.StringIO()
    csv.writer(text).writerow(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in cells]
    )
    return text.getvalue()
