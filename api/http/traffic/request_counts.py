"""Requests by route and status, and how long they took, for `GET /metrics`.

Each process counts in memory and adds its counts to a table every `FLUSH_SECONDS`, after a response was sent. So all
processes of the API give the same figures, which outlive them; a process that dies loses what it has not added.
"""

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

import structlog
from flask import Flask, Response, g, request
from sqlalchemy.exc import SQLAlchemyError

from api.http.request_log import KNOWN_METHODS
from jobs import monitoring
from jobs.db import Sessions
from jobs.monitoring import LATENCY_BOUNDS, WAITED, RequestKind

FLUSH_SECONDS = 5.0
log = structlog.get_logger()


class RequestCounts:
    """What this process has counted and not yet added to the table."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._counts: dict[RequestKind, list[float]] = defaultdict(lambda: [0, 0.0])
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    def add(self, kind: RequestKind, seconds: float) -> bool:
        """Count a request. Returns whether it is time to flush: True for one request in `FLUSH_SECONDS`."""
        with self._lock:
            entry = self._counts[kind]
            entry[0] += 1
            entry[1] += seconds
            is_due = time.monotonic() >= self._flush_at
            if is_due:
                self._flush_at = time.monotonic() + FLUSH_SECONDS
        return is_due

    def flush(self) -> None:
        """Add the counts to the table. While Postgres does not answer they are kept."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict(lambda: [0, 0.0])
        try:
            with self._sessions.begin() as session:
                monitoring.add_requests(session, {kind: (int(n), took) for kind, (n, took) in counts.items()})
        except SQLAlchemyError as error:
            log.warning("requests_not_counted_yet", error=type(error).__name__)
            with self._lock:
                for kind, (number, took) in counts.items():
                    self._counts[kind][0] += number
                    self._counts[kind][1] += took


def register(app: Flask, counts_of: Callable[[], RequestCounts]) -> None:
    """Count every response, when it begins."""

    def count(response: Response) -> Response:
        seconds = time.monotonic() - g.started
        counts = counts_of()
        if counts.add(_kind(response.status_code, seconds), seconds):
            response.call_on_close(counts.flush)
        return response

    app.after_request(count)


def _kind(status: int, seconds: float) -> RequestKind:
    """A request that waited for a job, as it was asked to, says nothing of the latency."""
    bucket = WAITED if "waited" in g else bisect_left(LATENCY_BOUNDS, seconds)
    method = request.method if request.method in KNOWN_METHODS else "OTHER"
    return RequestKind(method, request.url_rule.rule if request.url_rule else "", status, bucket)
