"""HTTP to one RenalQ: the session, its retries, and every refusal as one line."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from jobs.settings import Settings

Json = dict[str, Any]
CONNECT_SECONDS = 5.0
READ_SECONDS = 120.0
# A busy server and a lost answer are retried, as Retry-After says. A refused connection is not: no server is there.
RETRY = Retry(
    total=None,
    connect=0,
    read=3,
    status=12,
    other=0,
    status_forcelist={429, 503},
    allowed_methods=None,
    backoff_factor=0.5,
    raise_on_status=False,
)


class ApiError(Exception):
    """The API refused, or did not answer; the message is one line for the user.

    Args:
        line: the message.
        status: the HTTP status; None where there was no answer.
    """

    def __init__(self, line: str, status: int | None = None) -> None:
        super().__init__(line)
        self.status = status


def default_url() -> str:
    """RENALQ_URL, or else the address of the local stack."""
    return os.environ.get("RENALQ_URL") or f"http://127.0.0.1:{Settings().port}"


def default_key() -> str:
    """RENALQ_KEY, or else the local stack's admin key.

    Raises:
        ApiError: there is neither.
    """
    given = os.environ.get("RENALQ_KEY")
    if given:
        return given
    file = Settings().home / "admin.key"
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ApiError(f"No key: set RENALQ_KEY, or start `renalq up`, which writes {file}.") from error


class Transport:
    """Requests to one RenalQ with one key. Paths are without `/v1`."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.url = (url or default_url()).rstrip("/")
        self._base = f"{self.url}/v1"
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {key or default_key()}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        # A chunk of an upload is not sent again as it was: the server knows how much of it arrived.
        self._session.mount(f"{self._base}/uploads/", HTTPAdapter())
        # A proxy named in the environment does not apply to this machine.
        self._session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")

    def call(self, method: str, path: str, **options: Any) -> Json:
        """The JSON of `request`; `{}` where the response has no body."""
        response = self.request(method, path, **options)
        return dict(response.json()) if response.content else {}

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request, retried while the server is busy. A POST carries an Idempotency-Key: if a response is lost, the
        retry creates nothing twice.

        Raises:
            ApiError: the final status is not 2xx, or nobody answers.
        """
        if method == "POST":
            options["headers"] = {"Idempotency-Key": str(uuid.uuid4()), **options.get("headers", {})}
        response = self._send(method, path, options)
        while _is_in_flight(response):  # the first try's connection broke, and the server still works on it
            time.sleep(float(response.headers.get("Retry-After", 1)))
            response = self._send(method, path, options)
        if not response.ok:
            raise ApiError(problem_line(response), response.status_code)
        return response

    def _send(self, method: str, path: str, options: Json) -> requests.Response:
        try:
            return self._session.request(method, self._base + path, timeout=(CONNECT_SECONDS, READ_SECONDS), **options)
        except requests.ConnectionError as error:
            raise ApiError(f"Nobody answers at {self.url}: start `renalq up`, or set RENALQ_URL.") from error
        except requests.RequestException as error:
            raise ApiError(f"{method} {path} at {self.url} failed: {error}") from error

    def pages(self, path: str, **query: Any) -> Iterator[Json]:
        """Every entry of a list, page after page. For a running job it ends with the entries so far."""
        query = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.call("GET", path, params=query)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            query["after"] = page["next"]


def _is_in_flight(response: requests.Response) -> bool:
    return response.status_code == 409 and "IDEMPOTENCY_IN_FLIGHT" in response.text


def problem_line(response: requests.Response) -> str:
    """A problem document (RFC 9457) as one line."""
    try:
        problem = dict(response.json())
    except ValueError:
        return f"{response.status_code} {response.reason}: {response.text[:200]}"
    fields = [f"{error.get('pointer')}: {error.get('detail')}" for error in problem.get("errors") or []]
    fields += problem.get("reasons") or []
    line = f"{response.status_code} {problem.get('title') or response.reason}"
    line += f": {problem['detail']}" if problem.get("detail") else ""
    line += f" [{'; '.join(fields)}]" if fields else ""
    return f"{line} (request {problem['request_id']})" if problem.get("request_id") else line
