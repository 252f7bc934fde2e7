"""Answers that wait: `Prefer: wait=N`, and the ETag that makes polling cheap. Who waits holds no connection."""

import re
import time
import uuid

from flask import Response, request

from api.http.change_listener import Bell
from api.http.context import services, tenant, transaction
from jobs.errors import TooManyWatchers
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.states import Lane

MAX_WAIT = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)

Answer = tuple[JobView, int, dict[str, str]]


def job(job_id: uuid.UUID) -> JobView:
    """The job, as it stands now. Raises JobNotFound."""
    with transaction() as session:
        return queries.job(session, tenant(), job_id)


def accepted(job_id: uuid.UUID) -> Answer:
    """202 with the new job; 200 with the finished one where the client prefers to wait, and it ends in time."""
    wait = preferred_wait()
    view, waited = _when_done(job_id, wait) if wait else (job(job_id), False)
    headers = {"Location": f"/jobs/{job_id}", **retry_after(view)}
    if waited:
        headers["Preference-Applied"] = f"wait={wait}"
    return view, 200 if waited and view.terminal else 202, headers


def ended(job_id: uuid.UUID, seconds: float) -> JobView:
    """The job at its end, or as it stands after `seconds`; with no slot left as it stands now: who waited without one
    would take the threads that the slots leave for others."""
    view, _ = _when_done(job_id, seconds)
    return view


def unless_known(view: JobView) -> Answer | Response:
    """200 with the job, or 304 where the client has it. The place in the queue changes no row, so the tag names it."""
    tag = f"{view.job.revision}-{'' if view.queue_position is None else view.queue_position}"
    headers = {"ETag": f'W/"{tag}"', "Cache-Control": "private, no-cache", **retry_after(view)}
    if request.if_none_match.contains_weak(tag):
        return Response(status=304, headers=headers)
    return view, 200, headers


def unless_same(response: Response) -> Response:
    """304 where the client has this very answer. For `after_this_request`."""
    if response.status_code == 200:
        response.add_etag(weak=True)
        response.headers["Cache-Control"] = "private, no-cache"
    response.make_conditional(request)
    return response


def retry_after(view: JobView) -> dict[str, str]:
    """When to ask again (s)."""
    return {} if view.terminal else {"Retry-After": "1" if view.job.lane == Lane.URGENT else "2"}


def preferred_wait() -> int:
    """N of `Prefer: wait=N` (RFC 7240), 60 at most; 0 without one."""
    found = _WAIT.search(request.headers.get("Prefer", ""))
    return min(int(found[1]), MAX_WAIT) if found else 0


def _when_done(job_id: uuid.UUID, seconds: float) -> tuple[JobView, bool]:
    """The job at its end or after `seconds`; and whether we waited: with no slot left we answer at once."""
    try:
        with services().changes.watch(job_id) as bell:
            return _watch(job_id, bell, time.monotonic() + seconds), True
    except TooManyWatchers:
        return job(job_id), False


def _watch(job_id: uuid.UUID, bell: Bell, deadline: float) -> JobView:
    view = job(job_id)
    while not view.terminal and not services().changes.closed and bell.wait(deadline - time.monotonic()):
        view = job(job_id)
    return view
