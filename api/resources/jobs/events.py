"""A job's events: as pages of JSON, and as server-sent events (SSE). Each read is a short transaction."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import marshmallow as ma
from flask import Response, request
from marshmallow import fields
from sqlalchemy.exc import SQLAlchemyError

from api.http import streaming
from api.http.change_listener import Bell, Changes
from api.http.context import services, tenant
from api.http.fields import Time
from api.http.paging import PageSchema
from api.http.streaming import SSE
from jobs.errors import JobNotFound
from jobs.paging import Page
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.tables import JobEvent

ROWS = 500


class EventSchema(ma.Schema):
    """Something that happened to a job."""

    id = fields.Integer()
    type = fields.String()
    at = Time()
    data = fields.Dict()


class EventsPage(PageSchema):
    """Events, oldest first."""

    data = fields.List(fields.Nested(EventSchema), required=True)


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
            bell.wait(streaming.KEEP_ALIVE_SECONDS)
        if time.monotonic() - spoke >= streaming.KEEP_ALIVE_SECONDS:
            yield ": still here\n\n"
            spoke = time.monotonic()


def _event(event: JobEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(EventSchema().dump(event))}\n\n"


def _last_event_id() -> int:
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
