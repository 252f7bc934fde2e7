"""Download of scans that a manifest names by URL, from allowed hosts only.

No error contains the URL or any part of it, or is chained to its cause: the URL may name a patient.
"""

import logging
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import HTTPError

from jobs.addresses import fetch_url_error
from jobs.settings import Settings

BLOCK = 64 * 1024
MAX_REDIRECTS = 5
MIN_WAIT = 0.001
CONNECTIONS = 8
"""Connections kept open to one host: as many scans can be fetched at once without new handshakes."""
RETRYABLE = (408, 429)
"""Statuses that are retryable, as every 5xx."""
HEADERS = {"User-Agent": "renalq", "Accept-Encoding": "identity"}
REFUSED, FAILED, UNREACHABLE = "FETCH_REFUSED", "FETCH_FAILED", "FETCH_UNREACHABLE"


class FetchFailed(Exception):
    """The scan was not fetched: `code` for programs, the message for people, and whether a retry may help."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.retryable = code == UNREACHABLE


def fetch(url: str, folder: Path, settings: Settings) -> Path:
    """Download a scan as a new file in `folder`, at most `max_scan_bytes` large. May be called by many threads.

    Raises:
        FetchFailed: nothing is left in the folder.
    """
    deadline = time.monotonic() + settings.fetch_seconds
    try:
        for _ in range(1 + MAX_REDIRECTS):
            _refuse_other_hosts(url, settings)
            with _request(url, deadline) as response:
                target = response.get_redirect_location()
                if not target:
                    return _save(response, folder, settings, deadline)
            url = urljoin(url, target)
    except (HTTPError, ValueError) as error:  # ValueError: a redirect to an invalid URL
        why = f"The scan's server cannot be reached, or broke off ({type(error).__name__})."
        raise FetchFailed(UNREACHABLE, why) from None
    raise FetchFailed(FAILED, f"The scan's server redirects more than {MAX_REDIRECTS} times.")


def _refuse_other_hosts(url: str, settings: Settings) -> None:
    if why := fetch_url_error(url, settings.allowed_hosts):
        raise FetchFailed(REFUSED, why)


def _request(url: str, deadline: float) -> urllib3.BaseHTTPResponse:
    wait = urllib3.Timeout(total=max(deadline - time.monotonic(), MIN_WAIT))
    # Redirects are not followed here: each is a new URL, which must be allowed.
    return _pool().request("GET", url, redirect=False, retries=False, timeout=wait, preload_content=False)


@cache
def _pool() -> urllib3.PoolManager:
    # It logs whole URLs, at DEBUG and with some warnings.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return urllib3.PoolManager(maxsize=CONNECTIONS, headers=HEADERS)


def _save(response: urllib3.BaseHTTPResponse, folder: Path, settings: Settings, deadline: float) -> Path:
    if response.status != 200:
        retryable = response.status >= 500 or response.status in RETRYABLE
        raise FetchFailed(UNREACHABLE if retryable else FAILED, f"The scan's server answered {response.status}.")
    _refuse_beyond(int(response.headers.get("Content-Length") or 0), settings)
    descriptor, name = tempfile.mkstemp(prefix="fetched-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            # read1, not read, which would wait for a whole block, however slowly it comes, past the deadline.
            while block := response.read1(BLOCK):
                sink.write(block)
                _refuse_beyond(sink.tell(), settings)
                _refuse_after(deadline, settings)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)


def _refuse_beyond(size: int, settings: Settings) -> None:
    if size > settings.max_scan_bytes:
        raise FetchFailed(REFUSED, f"The scan is larger than {settings.max_scan_bytes} bytes (RENALQ_MAX_SCAN_BYTES).")


def _refuse_after(deadline: float, settings: Settings) -> None:
    if time.monotonic() > deadline:
        took = f"The scan took longer than {settings.fetch_seconds:g} s to come (RENALQ_FETCH_SECONDS)."
        raise FetchFailed(UNREACHABLE, took)
