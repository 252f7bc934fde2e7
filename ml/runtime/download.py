"""Downloads a dataset from an http(s) address or a Google Drive link, to a temporary file that is then renamed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import requests

from ml.runtime.errors import DownloadFailed, is_storage_full

MAX_BYTES = 20 * 2**30
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two chunks
_DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
_CHUNK = 1 << 20
_DRIVE_REFUSED = "source_url: Google Drive did not hand out the file: is it shared with everybody?"

OnProgress = Callable[[float], None]


def fetch(
    url: str,
    target: Path,
    max_bytes: int = MAX_BYTES,
    on_progress: OnProgress | None = None,
    timeout: tuple[float, float] = _TIMEOUT,
) -> None:
    """Download `url` to `target`. `on_progress` is called with the fraction done, if the source sends its size.
    `timeout`: seconds to connect, and between two chunks.

    DownloadFailed, without leaving a file, if the source cannot be reached, refuses, or sends more than `max_bytes`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        drive_id = google_drive_id(url)
        if drive_id:
            _fetch_drive(drive_id, partial, max_bytes, on_progress)
        else:
            _fetch_http(url, partial, max_bytes, on_progress, timeout)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def google_drive_id(url: str) -> str | None:
    """The file id of a Google Drive link (`/file/d/ID/view`, `/open?id=ID`, `/uc?id=ID`), else None."""
    parts = urlsplit(url)
    if parts.hostname not in _DRIVE_HOSTS:
        return None
    in_path = re.search(r"/d/([\w-]{10,})", parts.path)
    return in_path.group(1) if in_path else next(iter(parse_qs(parts.query).get("id", [])), None)


def is_reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether the server answers a HEAD of this address with success, within a few seconds."""
    try:
        return requests.head(url, timeout=(seconds, seconds), allow_redirects=True).ok
    except requests.RequestException:
        return False


def _fetch_http(
    url: str, partial: Path, max_bytes: int, on_progress: OnProgress | None, timeout: tuple[float, float]
) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadFailed("source_url: only http, https and Google Drive links can be downloaded.")
    try:
        with requests.get(url, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length") or 0)
            _write(response, partial, total, max_bytes, on_progress)
    except requests.HTTPError as error:
        raise DownloadFailed(f"source_url: the server answered {error.response.status_code}.") from error
    except requests.RequestException as error:
        raise DownloadFailed(f"source_url: the server cannot be reached ({type(error).__name__}).") from error


def _write(
    response: requests.Response, partial: Path, total: int, max_bytes: int, on_progress: OnProgress | None
) -> None:
    _refuse_beyond(total, max_bytes)
    done = 0
    with partial.open("wb") as sink:
        for chunk in response.iter_content(_CHUNK):
            done += len(chunk)
            _refuse_beyond(done, max_bytes)
            sink.write(chunk)
            if on_progress and total:
                on_progress(min(done / total, 1.0))
    if total and done < total and "Content-Encoding" not in response.headers:
        raise DownloadFailed("source_url: the connection ended before the whole file had come.")


def _refuse_beyond(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DownloadFailed(f"source_url: the file is larger than {max_bytes // 2**20} MiB.")


def _fetch_drive(drive_id: str, partial: Path, max_bytes: int, on_progress: OnProgress | None) -> None:
    import gdown

    too_large = threading.Event()

    def on_chunk(done: int, total: int | None) -> None:
        if max(done, total or 0) > max_bytes:
            too_large.set()
        if on_progress and total:
            on_progress(min(done / total, 1.0))

    try:
        gdown.download(
            id=drive_id, output=str(partial), quiet=True, use_cookies=False,
            progress=on_chunk, cancel=too_large, timeout=_TIMEOUT,
        )  # fmt: skip
    except Exception as error:  # gdown raises its own errors, requests' and OSError
        if is_storage_full(error):
            raise
        if too_large.is_set():
            _refuse_beyond(max_bytes + 1, max_bytes)
        raise DownloadFailed(_DRIVE_REFUSED) from error
    if not partial.exists():
        raise DownloadFailed(_DRIVE_REFUSED)
