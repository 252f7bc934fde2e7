"""Waiting for a job (`Prefer: wait=N`), and ETags that make polling cheap. A waiter holds no database connection."""

import re
import time
import uuid
from collections.abc import Callable
from typing import cast

from flask import Response, g, request

from api.http.body.spool import UploadRequest
from api.http.change_listener import Subscription
from api.http.context import holder, services, tenant, transaction
from api.http.versioning import address
from jobs.errors import TooManyWatchers
from jobs.results import queries
from jobs.results.queries import JobView
from jobs.states import Lane

MAX_WAIT = 60
"""Longest wait that a request may ask for (s)."""
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)

Answer = tuple[JobView, int, dict[str, str]]
Enough = Callable[[JobView], bool]


def job(job_id: uuid.UUID) -> JobView:
    """The job as it is now. Raises JobNotFound."""
    with transaction() as session:
        return queries.job(session, tenant(), job_id)


def accepted(job_id: uuid.UUID) -> Answer:
    """202 with the new job; 200 with the finished one if the client prefers to wait and the job ends in time."""
    view, applied = _preferred(job_id)
    headers = {"Location": address(f"/jobs/{job_id}"), **retry_after(view), **applied}
    return view, 200 if applied and view.terminal else 202, headers


def wait_for_end(job_id: uuid.UUID, seconds: float) -> JobView:
    """The job when it has ended, or after `seconds`.

    With all waiting slots taken it returns at once: a waiter without a slot would hold one of the threads that the
    slots leave for other requests. So it does when others get its slot.
    """
    view, _ = _wait(job_id, seconds)
    return view


def conditional_job(job_id: uuid.UUID) -> Answer | Response:
    """200 with the job, or 304 if the client has it.

    A client that prefers to wait gets it at its end; with `If-None-Match`, as soon as it is not what the client has.
    """
    view, applied = _preferred(job_id, _is_news if request.if_none_match else _never)
    headers = {"ETag": f'W/"{_tag(view)}"', "Cache-Control": "private, no-cache", **retry_after(view), **applied}
    return (view, 200, headers) if _is_news(view) else Response(status=304, headers=headers)


def _tag(view: JobView) -> str:
    """The queue position and the drift as well as the revision: they change without a change of the job's row."""
    drift = "-".join([view.model_drift["day"], *view.model_drift["figures"]]) if view.model_drift else ""
    return f"{view.job.revision}-{'' if view.queue_position is None else view.queue_position}-{drift}"


def _is_news(view: JobView) -> bool:
    return not request.if_none_match.contains_weak(_tag(view))


def make_conditional(response: Response) -> Response:
    """Tag a response by its content: 304 if the client has it. For `after_this_request`."""
    if response.status_code == 200:
        response.add_etag(weak=True)
        response.headers["Cache-Control"] = "private, no-cache"
    response.make_conditional(request)
    return response


def retry_after(view: JobView) -> dict[str, str]:
    """`Retry-After` (s) of a job that has not ended."""
    return {} if view.terminal else {"Retry-After": "1" if view.job.lane == Lane.URGENT else "2"}


def preferred_wait() -> int:
    """N of `Prefer: wait=N` (RFC 7240), `MAX_WAIT` at most; 0 without one."""
    found = _WAIT.search(request.headers.get("Prefer", ""))
    return min(int(found[1]), MAX_WAIT) if found else 0


def _never(view: JobView) -> bool:
    return False


def _preferred(job_id: uuid.UUID, enough: Enough = _never) -> tuple[JobView, dict[str, str]]:
    """The job when the client prefers it, and the header that says whether it was waited for."""
    wait = preferred_wait()
    view, waited = _wait(job_id, wait, enough) if wait else (job(job_id), False)
    return view, {"Preference-Applied": f"wait={wait}"} if waited else {}


def _wait(job_id: uuid.UUID, seconds: float, enough: Enough = _never) -> tuple[JobView, bool]:
    """The job at its end, when it is `enough`, or after `seconds`; and whether there was a slot to wait in."""
    cast(UploadRequest, request).end_turn()
    try:
        with services().listener.subscribe(job_id, holder()) as subscription:
            g.waited = True
            view = _wait_until(job_id, subscription, time.monotonic() + seconds, enough)
            return view, view.terminal or not subscription.closed
    except TooManyWatchers:
        return job(job_id), False


def _wait_until(job_id: uuid.UUID, subscription: Subscription, deadline: float, enough: Enough) -> JobView:
    view = job(job_id)
    while not (view.terminal or enough(view) or subscription.closed) and subscription.wait(deadline - time.monotonic()):
        view = job(job_id)
    return view
