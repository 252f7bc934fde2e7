"""Download of what a request names by URL, from allowed hosts only: a manifest's scans, and a training's dataset.

No error contains the URL or any part of it, or is chained to its cause: the URL may name a patient. Nor does it tell
why there was no answer: a client could find out which ports of an internal network are open.
"""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

import structlog
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError

from jobs.addresses import fetch_url_error, is_fetchable
from jobs.settings import Settings
from ml.runtime.download import google_drive_id

BLOCK = 64 * 1024
MAX_REDIRECTS = 5
MIN_WAIT = 0.001
CONNECTIONS = 8
"""Connections kept open to one host: as many scans can be fetched at once without new handshakes."""
SILENCE_SECONDS = 60.0
"""Longest wait for the next bytes of a dataset, whose download has no time limit."""
RETRYABLE = (408, 429)
"""Statuses that are retryable, as every 5xx."""
HEADERS = {"User-Agent": "renalq", "Accept-Encoding": "identity"}
DRIVE = "https://drive.usercontent.google.com/download"
REFUSED, FAILED, UNREACHABLE = "FETCH_REFUSED", "FETCH_FAILED", "FETCH_UNREACHABLE"
NO_ANSWER = "The server did not deliver the file. Can the workers reach it?"

log = structlog.get_logger()

OnBlock = Callable[[int, int], None]
"""Called with the bytes that have come, and those that were announced (0: none were)."""


class FetchFailed(Exception):
    """The file was not fetched: `code` for programs, the message for people, and whether a retry may help."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.retryable = code == UNREACHABLE


@dataclass(frozen=True)
class _Limits:
    """How large a file may be (bytes), and by when it must have come (monotonic seconds); the settings that say so."""

    size: int
    size_setting: str
    deadline: float | None = None
    too_late: str = ""

    def wait(self) -> float:
        """The longest silence (s)."""
        left = SILENCE_SECONDS if self.deadline is None else self.deadline - time.monotonic()
        return max(left, MIN_WAIT)

    def refuse_beyond(self, size: int) -> None:
        """Raise FetchFailed if the file is too large, or late."""
        if size > self.size:
            raise FetchFailed(REFUSED, f"The file is larger than {self.size} bytes ({self.size_setting}).")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise FetchFailed(UNREACHABLE, self.too_late)


def fetch(url: str, folder: Path, settings: Settings) -> Path:
    """Download a scan as a new file in `folder`, at most `max_scan_bytes` large. May be called by many threads.

    Raises:
        FetchFailed: nothing is left in the folder.
    """
    deadline = time.monotonic() + settings.fetch_seconds
    too_late = f"The file took longer than {settings.fetch_seconds:g} s to come (RENALQ_FETCH_SECONDS)."
    limits = _Limits(settings.max_scan_bytes, "RENALQ_MAX_SCAN_BYTES", deadline, too_late)
    return _fetched(url, folder, settings, limits, _ignore)


def fetch_dataset(url: str, folder: Path, settings: Settings, on_block: OnBlock) -> Path:
    """Download a dataset's zip, at most `max_archive_bytes` large, from an address or a Google Drive share link.

    Raises:
        FetchFailed: nothing is left in the folder.
    """
    drive_id = google_drive_id(url)
    if drive_id is not None:
        url = f"{DRIVE}?{urlencode({'id': drive_id, 'export': 'download', 'confirm': 't'})}"
    return _fetched(url, folder, settings, _Limits(settings.max_archive_bytes, "RENALQ_MAX_ARCHIVE_BYTES"), on_block)


def _ignore(came: int, announced: int) -> None:
    """Nobody is told."""


def _fetched(url: str, folder: Path, settings: Settings, limits: _Limits, on_block: OnBlock) -> Path:
    try:
        for _ in range(1 + MAX_REDIRECTS):
            if why := fetch_url_error(url, settings.allowed_hosts):
                raise FetchFailed(REFUSED, why)
            with _request(url, limits) as response:
                target = response.get_redirect_location()
                if not target:
                    return _save(response, folder, limits, on_block)
            url = urljoin(url, target)
    except (HTTPError, ValueError) as error:  # ValueError: a redirect to an invalid URL
        log.warning("fetch_unanswered", error=type(error).__name__)
        raise FetchFailed(UNREACHABLE, NO_ANSWER) from None
    raise FetchFailed(FAILED, f"The server redirects more than {MAX_REDIRECTS} times.")


def _request(url: str, limits: _Limits) -> urllib3.BaseHTTPResponse:
    wait = limits.wait()
    timeout = urllib3.Timeout(total=wait) if limits.deadline is not None else urllib3.Timeout(connect=wait, read=wait)
    # Redirects are not followed here: each is a new URL, which must be allowed.
    return _pool().request("GET", url, redirect=False, retries=False, timeout=timeout, preload_content=False)


class _Checked:
    """Connects to an address that was checked after the name was looked up, once: a name that changes has no effect."""

    def _new_conn(self: Any) -> socket.socket:
        name = self._dns_host
        failed: HTTPError = NewConnectionError(self, "no address")
        for address in _addresses(name, self.port):
            self._dns_host = address
            try:
                return super()._new_conn()  # type: ignore[misc, no-any-return]
            except HTTPError as error:
                failed = error
            finally:
                self._dns_host = name  # which the certificate must be of
        raise failed


class _Http(_Checked, HTTPConnection):
    """http."""


class _Https(_Checked, HTTPSConnection):
    """https."""


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Https


def _addresses(name: str, port: int) -> list[str]:
    """The addresses of a host that may be fetched from. An address that is itself in `RENALQ_FETCH_HOSTS` may be."""
    bare = name.strip("[]")
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)]
    except OSError:
        return []
    return [address for address in dict.fromkeys(found) if address == bare or is_fetchable(address)]


@cache
def _pool() -> urllib3.PoolManager:
    """Connections without proxies and passwords of the environment (`HTTP_PROXY`, .netrc)."""
    # It logs whole URLs, at DEBUG and with some warnings.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    pool = urllib3.PoolManager(maxsize=CONNECTIONS, headers=HEADERS)
    pool.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return pool


def _save(response: urllib3.BaseHTTPResponse, folder: Path, limits: _Limits, on_block: OnBlock) -> Path:
    if response.status != 200:
        retryable = response.status >= 500 or response.status in RETRYABLE
        raise FetchFailed(UNREACHABLE if retryable else FAILED, f"The server answered {response.status}.")
    announced = int(response.headers.get("Content-Length") or 0)
    limits.refuse_beyond(announced)
    descriptor, name = tempfile.mkstemp(prefix="fetched-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            # read1, not read, which would wait for a whole block, however slowly it comes, past the deadline.
            while block := response.read1(BLOCK):
                sink.write(block)
                limits.refuse_beyond(sink.tell())
                on_block(sink.tell(), announced)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)
