"""Answers that go on: events as they happen (SSE), results as NDJSON and CSV. Each read is a short transaction."""

import csv
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from flask import Response, request
from sqlalchemy.exc import SQLAlchemyError

from api.changes import Bell, Changes
from api.schemas import EventSchema, ResultSchema
from api.services import services, tenant
from jobs import queries
from jobs.db import Sessions
from jobs.errors import JobNotFound
from jobs.queries import JobView, Page
from jobs.tables import JobEvent, Json, ScanResult

SSE, NDJSON, CSV = "text/event-stream", "application/x-ndjson", "text/csv"
KEEP_ALIVE_SECONDS = 15.0
ROWS = 500
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet would run."""


def wanted(*kinds: str) -> str:
    """The kind of answer that the client accepts best; JSON where it does not say."""
    return request.accept_mimetypes.best_match(["application/json", *kinds], "application/json")


# --- events ---


def events(job_id: uuid.UUID) -> Response:
    """The job's events after `Last-Event-ID`, then each new one until the last.

    Raises:
        TooManyWatchers
    """
    sessions, changes, owner = services().sessions, services().changes, tenant()
    stack = ExitStack()
    bell = stack.enter_context(changes.watch(job_id))

    def read(after: int) -> tuple[JobView, Page[JobEvent]]:
        with sessions.begin() as session:
            return queries.job(session, owner, job_id), queries.events(session, job_id, ROWS, after)

    response = Response(_told(read, changes, bell, _last_event_id()), mimetype=SSE)
    response.headers["X-Accel-Buffering"] = "no"  # a proxy that buffers would hold events back
    response.call_on_close(stack.close)
    return response


Read = Callable[[int], tuple[JobView, Page[JobEvent]]]


def _told(read: Read, changes: Changes, bell: Bell, after: int) -> Iterator[str]:
    yield "retry: 2000\n\n"
    spoke = time.monotonic()
    while not changes.closed:
        try:
            view, found = read(after)  # the job first: if it has ended by then, its last event is among those read next
        except (SQLAlchemyError, JobNotFound):
            return  # the client comes back with its Last-Event-ID
        for event in found.data:
            yield _event(event)
            after, spoke = event.id, time.monotonic()
        if view.terminal and not found.has_more:
            return
        if not found.has_more:
            bell.wait(KEEP_ALIVE_SECONDS)
        if time.monotonic() - spoke >= KEEP_ALIVE_SECONDS:
            yield ": still here\n\n"
            spoke = time.monotonic()


def _event(event: JobEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(EventSchema().dump(event))}\n\n"


def _last_event_id() -> int:
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


# --- results ---


def result(view: JobView, row: ScanResult) -> Json:
    """A prediction as a client sees it."""
    version = view.job.model_version
    shown: Json = {
        "scan_id": row.scan_id,
        "name": row.name,
        "state": row.state,
        "label": row.label,
        "confidence": row.confidence,
        "probabilities": row.probabilities,
        "model_version": None if version is None else str(version),
        "engine": row.engine,
    }
    optional = {"custom_id": row.custom_id, "error": row.error}
    return shown | {name: value for name, value in optional.items() if value is not None}


def results(view: JobView, kind: str, state: str | None) -> Response:
    """All results that have ended (or are in `state`) as NDJSON or CSV."""
    sessions = services().sessions
    with sessions.begin() as session:
        queries.results(session, view, state, 1)  # refuses a training before the answer begins
        classes = queries.classes(session, view)
    rows = _all_results(sessions, view, state)
    lines = _csv(rows, classes) if kind == CSV else (json.dumps(row) + "\n" for row in rows)
    return Response(lines, mimetype=kind)


def _all_results(sessions: Sessions, view: JobView, state: str | None) -> Iterator[Json]:
    schema, after = ResultSchema(), -1
    while True:
        with sessions.begin() as session:
            found = queries.results(session, view, state, ROWS, after)
        yield from (schema.dump(result(view, row)) for row in found.data)
        if not found.has_more or not found.data:
            return
        after = found.data[-1].ordinal


COLUMNS = ("scan_id", "name", "custom_id", "state", "label", "confidence", "model_version", "engine")


def _csv(rows: Iterator[Json], classes: list[str]) -> Iterator[str]:
    yield _line([*COLUMNS, *(f"probability_{name}" for name in classes), "error_code", "error_detail"])
    for row in rows:
        probabilities, error = row["probabilities"] or {}, row.get("error") or {}
        cells = [row.get(name) for name in COLUMNS] + [probabilities.get(name) for name in classes]
        yield _line([*cells, error.get("code"), error.get("detail")])


def _line(cells: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in cells]
    )
    return line.getvalue()
