"""A prediction's results: pages of JSON, and streams of NDJSON and CSV that follow the job to its end."""

import csv
import errno
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from flask import Response
from marshmallow import fields, validate
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.http import streaming
from api.http.change_listener import Bell, Changes
from api.http.context import services, tenant
from api.http.fields import words
from api.http.paging import NumberedQuery, PageSchema
from api.http.streaming import CSV
from api.resources.jobs.explanations import ExplainedSchema, explained
from api.resources.jobs.schemas import ErrorSchema
from jobs.errors import RenalQError
from jobs.models import feedback
from jobs.paging import Page
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.states import ResultState
from jobs.tables import Json, ScanResult

ROWS = 500
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet would run."""


class ResultsQuery(NumberedQuery):
    """Which results to list: without `state`, those that have ended."""

    after = fields.Integer(load_default=None, validate=validate.Range(0, 2**31 - 1))
    state = fields.String(load_default=None, validate=words(ResultState))


class ResultSchema(ExplainedSchema):
    """A prediction for one scan."""

    ordinal = fields.Integer(metadata={"description": "Its place in the job, from 0: `after` of what follows it."})
    scan_id = fields.UUID(allow_none=True)
    name = fields.String(allow_none=True)
    custom_id = fields.String(allow_none=True)
    patient = fields.String(allow_none=True)
    study = fields.String(allow_none=True)
    state = fields.String(validate=words(ResultState))
    label = fields.String(allow_none=True)
    confidence = fields.Float(allow_none=True)
    probabilities = fields.Dict(keys=fields.String(), values=fields.Float(), allow_none=True)
    disposition = fields.String(
        allow_none=True,
        metadata={"description": "What may be done with it: a class in lower case, `indeterminate` or `rejected`."},
    )
    reason = fields.String(allow_none=True, metadata={"description": "Why it is indeterminate or rejected."})
    ood_score = fields.Float(
        allow_none=True, metadata={"description": "Above 1 the scan is unlike those that the network has learnt from."}
    )
    truth = fields.String(metadata={"description": "What it turned out to show, once that was told."})
    model_version = fields.String(allow_none=True)
    engine = fields.String(allow_none=True, metadata={"description": "What computed it, such as openvino-bf16."})
    cached = fields.Boolean(metadata={"description": "Taken from an equal result: same scan, model and engine."})
    error = fields.Nested(ErrorSchema)


class ResultsPage(PageSchema):
    """Predictions in the order of their scans."""

    data = fields.List(fields.Nested(ResultSchema), required=True)


def shown(session: Session, view: JobView, found: Page[ScanResult]) -> Page[Json]:
    """Predictions as a client sees them; those that are explained by now say where."""
    seen = explained(session, view, found.data)
    told = feedback.labels(session, view.job.model_id, [row.scan_id for row in found.data])
    rows = [_result(view, row, told.get(row.scan_id)) | seen.get(row.ordinal, {}) for row in found.data]
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
    optional: Json = {"custom_id": row.custom_id, "patient": row.patient, "study": row.study, "truth": truth}
    optional["error"] = row.error
    return result | {name: value for name, value in optional.items() if value is not None}


def streamed(view: JobView, kind: str, state: str | None, after: int | None) -> Response:
    """All results that have ended (or are in `state`) and come after that one, as NDJSON or CSV. Of a job that has not
    ended they come as they do, until its end.

    Raises:
        NoResults, ResultsExpired, TooManyWatchers
    """
    sessions, changes, owner, job_id = services().sessions, services().changes, tenant(), view.job.id
    with sessions.begin() as session:
        queries.results(session, view, state, 1, after)  # what has no results is refused before the answer begins
        classes = queries.classes(session, view)
    stack = ExitStack()
    bell = None if view.terminal else stack.enter_context(changes.watch(job_id))

    def read(after: int | None) -> tuple[JobView, Page[Json]]:
        with sessions.begin() as session:
            now = queries.job(session, owner, job_id)  # the job first: if it has ended by then, all its results have
            return now, shown(session, now, queries.results(session, now, state, ROWS, after))

    pages = _followed(read, changes, bell, after)
    response = Response(_csv(pages, classes) if kind == CSV else _ndjson(pages), mimetype=kind)
    response.headers["X-Accel-Buffering"] = "no"  # a proxy that buffers would hold results back
    response.call_on_close(stack.close)
    return response


ReadResults = Callable[[int | None], tuple[JobView, Page[Json]]]


def _followed(read: ReadResults, changes: Changes, bell: Bell | None, after: int | None) -> Iterator[list[Json]]:
    """All results, some at a time, until the job has ended; an empty list where there were none for a while.

    Raises:
        ConnectionResetError: there is more, but not from us.
    """
    schema, spoke = ResultSchema(), time.monotonic()
    while True:
        try:
            _, found = read(after)
        except (SQLAlchemyError, RenalQError):
            raise _cut() from None
        if found.data:
            yield [schema.dump(row) for row in found.data]
            after, spoke = found.data[-1]["ordinal"], time.monotonic()
        if not found.has_more:
            return
        if bell is not None and len(found.data) < ROWS:
            if changes.closed:
                raise _cut()
            bell.wait(streaming.KEEP_ALIVE_SECONDS)
        if time.monotonic() - spoke >= streaming.KEEP_ALIVE_SECONDS:
            yield []
            spoke = time.monotonic()


def _cut() -> OSError:
    """What ends an answer so that the client sees that it is not whole: gunicorn takes it for a connection that was
    lost, and closes it without the last chunk."""
    return OSError(errno.ECONNRESET, "The results are not whole: go on with `after`.")


def _ndjson(pages: Iterator[list[Json]]) -> Iterator[str]:
    for page in pages:
        yield "".join(json.dumps(row) + "\n" for row in page) or "\n"


COLUMNS = (
    "scan_id", "name", "custom_id", "patient", "study", "state", "label", "confidence", "model_version", "engine",
    "cached", "explanation", "ordinal",
    "disposition", "reason", "ood_score", "truth", "heatmap", "explanation_note",
)  # fmt: skip
"""Some read them by position: a new one comes last. Behind them come the classes, which are of each model's own."""


def _csv(pages: Iterator[list[Json]], classes: list[str]) -> Iterator[str]:
    yield _line([*COLUMNS, *(f"probability_{name}" for name in classes), "error_code", "error_detail"])
    for page in pages:
        yield "".join(_line(_cells(row, classes)) for row in page) or "\r\n"


def _cells(row: Json, classes: list[str]) -> list[Any]:
    probabilities, error = row["probabilities"] or {}, row.get("error") or {}
    own = [row.get(name) for name in COLUMNS]
    return [*own, *(probabilities.get(name) for name in classes), error.get("code"), error.get("detail")]


def _line(cells: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in cells]
    )
    return line.getvalue()
