"""Files on their way to the API: small ones in one request, large ones so that nothing is sent twice.

Many scans are hashed, and only those that the server does not have are sent: after a broken connection or an
interrupted command, the same command sends the rest. One large file is sent in chunks (the tus protocol), each from
where the last one ended.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from cli.client.transport import ApiError, Transport

T = TypeVar("T")
SINGLE_REQUEST_BYTES = 32 * 1024**2
"""Up to this size one request is best: if it breaks, sending it again costs little."""
MAX_BATCH_SCANS = 10_000
"""The API accepts no more in one batch."""
CHUNK_BYTES = 16 * 1024**2
PARALLEL_REQUESTS = 8
"""Scans sent at the same time: the server waits for its disk with each."""
RECONNECT_SECONDS = 120.0
"""How long a lost connection may take to come back. After that, the same command continues where it stopped."""
RETRY_SECONDS = 1.0
TUS = {"Tus-Resumable": "1.0.0"}
UNREACHABLE = (None, 502, 503, 504)
"""Statuses of a network or a server that is away: worth waiting for."""
RESUMABLE = (*UNREACHABLE, 400, 409, 423, 429)
"""Statuses after which a chunk is worth another try: the server has more or less of the file than we assumed, or still
waits for a connection that is lost."""


class MultipartUpload:
    """A multipart body that is read from disk while it is sent: a dataset need not fit into memory.

    `requests` accepts an iterable with a length, and then sends Content-Length instead of chunks.
    """

    BLOCK = 1024**2

    def __init__(self, field: str, files: Sequence[Path], form: dict[str, str] | None = None) -> None:
        boundary = secrets.token_hex(16)
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._end = f"--{boundary}--\r\n".encode()
        self._fields = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in (form or {}).items()
        ]
        self._parts = [(self._head(boundary, field, path), path, path.stat().st_size) for path in files]

    @staticmethod
    def _head(boundary: str, field: str, path: Path) -> bytes:
        name = path.name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        return (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()

    def __len__(self) -> int:
        files = sum(len(head) + size + 2 for head, _, size in self._parts)
        return sum(map(len, self._fields)) + files + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._fields
        for head, path, _ in self._parts:
            yield head
            with path.open("rb") as stream:
                while block := stream.read(self.BLOCK):
                    yield block
            yield b"\r\n"
        yield self._end


class FileChunk:
    """Part of a file, read while it is sent. Small blocks: each must pass within the socket's timeout."""

    BLOCK = 64 * 1024

    def __init__(self, file: Path, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        with self._file.open("rb") as stream:
            stream.seek(self._start)
            while block := stream.read(min(self.BLOCK, left)):
                left -= len(block)
                yield block


class ProgressListener:
    """Receives the progress of an upload. This one ignores it, and raises the error of a refused file."""

    def on_progress(self, stage: str, share: float) -> None:
        """`share` (0 to 1) of a stage is done."""

    def on_refused(self, file: Path, error: ApiError) -> None:
        """The API refused this file. Raise the error, or return to continue without the file."""
        raise ApiError(f"{file}: {error}", error.status)


def fits_one_request(files: Sequence[Path]) -> bool:
    """Whether the files are small enough for one request."""
    return sum(file.stat().st_size for file in files) <= SINGLE_REQUEST_BYTES


class RetryTimer:
    """Waits between tries until nothing has moved on for `RECONNECT_SECONDS`. Every progress restarts the time."""

    def __init__(self, retryable: Sequence[int | None]) -> None:
        self._retryable = retryable
        self._reached, self._since = -1, time.monotonic()

    def wait(self, error: ApiError, reached: int) -> None:
        """Wait before the next try, or raise the error. `reached` grows with the progress."""
        if reached > self._reached:
            self._reached, self._since = reached, time.monotonic()
        if error.status not in self._retryable or time.monotonic() - self._since > RECONNECT_SECONDS:
            raise error
        time.sleep(RETRY_SECONDS)


def retry_while_unreachable(call: Callable[[], T]) -> T:
    """Repeat the call while the API cannot be reached. A refusal is raised at once."""
    timer = RetryTimer(UNREACHABLE)
    while True:
        try:
            return call()
        except ApiError as error:
            timer.wait(error, 0)


def store_scans(transport: Transport, files: Sequence[Path], listener: ProgressListener) -> list[tuple[Path, str]]:
    """Store the files as scans. Returns those that were accepted, in order, each with its scan's id.

    Raises:
        ApiError: too many files, none of them a scan, or a connection that does not come back.
    """
    if len(files) > MAX_BATCH_SCANS:
        limit = f"at most {MAX_BATCH_SCANS} are taken"
        raise ApiError(f"{len(files)} scans are too many for one batch: {limit}. Split them.")
    hashes = _hash_all(files, listener)
    content = dict(zip(hashes, files, strict=True))
    ids: dict[str, str] = transport.call("POST", "/scans/known", json={"sha256": list(content)})["data"]
    missing = {sha256: file for sha256, file in content.items() if sha256 not in ids}
    timer = RetryTimer(UNREACHABLE)
    while missing:
        try:
            _send_missing(transport, missing, ids, listener)
        except ApiError as error:
            timer.wait(error, len(ids))
    if not ids:
        raise ApiError("None of the files is a scan: send PNG, JPEG, DICOM or NIfTI.")
    return [(file, ids[sha256]) for file, sha256 in zip(files, hashes, strict=True) if sha256 in ids]


def _send_missing(
    transport: Transport, missing: dict[str, Path], ids: dict[str, str], listener: ProgressListener
) -> None:
    for sha256, answer in _in_parallel(lambda file: _store_scan(transport, file), dict(missing), "sending", listener):
        file = missing.pop(sha256)
        if isinstance(answer, ApiError):
            listener.on_refused(file, answer)
        else:
            ids[sha256] = answer


def _hash_all(files: Sequence[Path], listener: ProgressListener) -> list[str]:
    hashes = dict(_in_parallel(_sha256, dict(enumerate(files)), "hashing", listener))
    return [hashes[number] for number in range(len(files))]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _store_scan(transport: Transport, file: Path) -> str | ApiError:
    """The id of the stored scan, or the API's refusal."""
    upload = MultipartUpload("file", [file])
    # The content is its own key. An Idempotency-Key would block the retry for a minute where a server died with it.
    headers = {"Content-Type": upload.content_type, "Idempotency-Key": None}
    try:
        return str(transport.call("POST", "/scans", data=upload, headers=headers)["id"])
    except ApiError as error:
        if error.status not in (413, 422):
            raise
        return error


def _in_parallel(
    do: Callable[[Path], T], files: dict[Any, Path], stage: str, listener: ProgressListener
) -> Iterator[tuple[Any, T]]:
    """Call `do` with all files, some at a time; the first error ends it."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        keys = {pool.submit(do, file): key for key, file in files.items()}
        try:
            for done, future in enumerate(as_completed(keys), 1):
                yield keys[future], future.result()
                listener.on_progress(stage, done / len(keys))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def upload_file(transport: Transport, file: Path, listener: ProgressListener) -> str:
    """Upload the file in chunks. Returns the id of the complete upload.

    Raises:
        ApiError: it was refused, or made no progress for `RECONNECT_SECONDS`.
    """
    size, name = file.stat().st_size, base64.b64encode(file.name.encode()).decode()
    headers = {**TUS, "Upload-Length": str(size), "Upload-Metadata": f"filename {name}"}
    upload_id = str(transport.call("POST", "/uploads", headers=headers)["id"])
    at, timer = 0, RetryTimer(RESUMABLE)
    while True:
        try:
            at = _offset(transport, upload_id)
            listener.on_progress("sending", at / size)
            if at == size:
                return upload_id
            _send_chunk(transport, upload_id, FileChunk(file, at, min(CHUNK_BYTES, size - at)), at)
        except ApiError as error:
            timer.wait(error, at)


def _offset(transport: Transport, upload_id: str) -> int:
    return int(transport.request("HEAD", f"/uploads/{upload_id}", headers=TUS).headers["Upload-Offset"])


def _send_chunk(transport: Transport, upload_id: str, chunk: FileChunk, start: int) -> None:
    headers = {**TUS, "Upload-Offset": str(start), "Content-Type": "application/offset+octet-stream"}
    transport.request("PATCH", f"/uploads/{upload_id}", data=chunk, headers=headers)
