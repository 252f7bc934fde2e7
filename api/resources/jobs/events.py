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

from api.http import responses
from api.http.change_listener import Subscription
from api.http.context import holder, services, tenant
from api.http.fields import Time
from api.http.paging import PageSchema
from api.http.responses import SSE
from jobs.errors import JobNotFound
from jobs.paging import Page
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.tables import JobEvent

ROWS = 500


class EventSchema(ma.Schema):
    """An event of a job."""

    id = fields.Integer()
    type = fields.String()
    at = Time()
    data = fields.Dict()


class EventsPage(PageSchema):
    """Events, oldest first."""

    data = fields.List(fields.Nested(EventSchema), required=True)


def stream_events(job_id: uuid.UUID) -> Response:
    """A response with the job's events after `Last-Event-ID`, then each new one until the job has ended.

    Raises:
        TooManyWatchers
    """
    sessions, owner = services().sessions, tenant()
    stack = ExitStack()
    subscription = stack.enter_context(services().listener.subscribe(job_id, holder()))

    def read(after: int) -> tuple[JobView, Page[JobEvent]]:
        with sessions.begin() as session:
            return queries.job(session, owner, job_id), queries.events(session, job_id, ROWS, after)

    return responses.stream(_server_sent(read, subscription, _last_event_id()), SSE, stack.close)


Read = Callable[[int], tuple[JobView, Page[JobEvent]]]


def _server_sent(read: Read, subscription: Subscription, after: int) -> Iterator[str]:
    yield "retry: 2000\n\n"
    sent_at = time.monotonic()
    while not subscription.closed:  # the client reconnects with its Last-Event-ID
        try:
            view, found = read(after)  # the job before its events: if it has ended, its last event is among them
        except (SQLAlchemyError, JobNotFound):
            return  # the client reconnects with its Last-Event-ID
        for event in found.data:
            yield _event(event)
            after, sent_at = event.id, time.monotonic()
        if view.terminal and not found.has_more:
            return
        if not found.has_more:
            subscription.wait(responses.KEEP_ALIVE_SECONDS)
        if time.monotonic() - sent_at >= responses.KEEP_ALIVE_SECONDS:
            yield ": still here\n\n"
            sent_at = time.monotonic()


def _event(event: JobEvent) -> str:
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(EventSchema().dump(event))}\n\n"


def _last_event_id() -> int:
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
