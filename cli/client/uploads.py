"""Files on their way to the API. Little goes in one request; much goes so that nothing is sent twice.

Many scans are hashed, and only those that are not stored yet are sent: after a broken connection, or a command that
was stopped, the same command sends the rest. One large file goes in pieces (tus), each from where the last one ended.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cli.client.errors import ApiError

if TYPE_CHECKING:
    from cli.client.rest import Client

T = TypeVar("T")
FEW_BYTES = 32 * 1024**2
"""So much goes in one request: if it breaks, sending it again costs little."""
MOST_SCANS = 10_000
"""The API takes no more in one batch."""
PIECE_BYTES = 16 * 1024**2
AT_ONCE = 8
"""Scans sent at the same time: the server waits for its disk with each."""
PATIENCE_SECONDS = 120.0
"""So long a lost connection may take to come back; after that, the same command goes on where it stopped."""
PAUSE_SECONDS = 1.0
TUS = {"Tus-Resumable": "1.0.0"}
AWAY = (None, 502, 503, 504)
"""The network, or the server behind it: worth waiting for."""
ELSEWHERE = (*AWAY, 400, 409, 423, 429)
"""Of a piece: the server has more or less of the file than we thought, or still waits for a connection that is lost."""


class Upload:
    """A multipart body that is read from disk as it is sent: a data set need not fit into memory.

    `requests` takes an iterable with a length and then sends Content-Length instead of chunks.
    """

    CHUNK = 1024**2

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
                while chunk := stream.read(self.CHUNK):
                    yield chunk
            yield b"\r\n"
        yield self._end


class Piece:
    """A stretch of a file, read as it is sent. Small chunks: each must pass within the socket's timeout."""

    CHUNK = 64 * 1024

    def __init__(self, file: Path, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        with self._file.open("rb") as stream:
            stream.seek(self._start)
            while chunk := stream.read(min(self.CHUNK, left)):
                left -= len(chunk)
                yield chunk


class Onlooker:
    """Who sees how sending goes on. This one looks away, but lets no file be left out."""

    def moved(self, stage: str, share: float) -> None:
        """So much of a stage is done (0 to 1)."""

    def refused(self, file: Path, error: ApiError) -> None:
        """The API took all but this file. Raise it, or go on without the file."""
        raise ApiError(f"{file}: {error}", error.status)


def is_little(files: Sequence[Path]) -> bool:
    """Whether one request is best."""
    return sum(file.stat().st_size for file in files) <= FEW_BYTES


class Patience:
    """How long a lost connection is waited for: anew from whatever moves on."""

    def __init__(self, worth_waiting: Sequence[int | None]) -> None:
        self._worth_waiting = worth_waiting
        self._reached, self._since = -1, time.monotonic()

    def wait(self, error: ApiError, reached: int) -> None:
        """Wait a little, or raise the error. `reached` grows with what is done."""
        if reached > self._reached:
            self._reached, self._since = reached, time.monotonic()
        if error.status not in self._worth_waiting or time.monotonic() - self._since > PATIENCE_SECONDS:
            raise error
        time.sleep(PAUSE_SECONDS)


def patiently(call: Callable[[], T]) -> T:
    """Call again while the network is away. A refusal is raised at once."""
    patience = Patience(AWAY)
    while True:
        try:
            return call()
        except ApiError as error:
            patience.wait(error, 0)


def stored_scans(client: Client, files: Sequence[Path], onlooker: Onlooker) -> list[tuple[Path, str]]:
    """The files with their scans' ids, in order, once all are stored. Those that are refused are not among them.

    Raises:
        ApiError: too many, none of them a scan, or a connection that does not come back.
    """
    if len(files) > MOST_SCANS:
        raise ApiError(f"{len(files)} scans are too many for one batch: at most {MOST_SCANS} are taken. Split them.")
    hashes = _hashed(files, onlooker)
    content = dict(zip(hashes, files, strict=True))
    found: dict[str, str] = client.call("POST", "/scans/known", json={"sha256": list(content)})["data"]
    missing = {sha256: file for sha256, file in content.items() if sha256 not in found}
    patience = Patience(AWAY)
    while missing:
        try:
            _send_missing(client, missing, found, onlooker)
        except ApiError as error:
            patience.wait(error, len(found))
    if not found:
        raise ApiError("None of the files is a scan: send PNG, JPEG or DICOM.")
    return [(file, found[sha256]) for file, sha256 in zip(files, hashes, strict=True) if sha256 in found]


def _send_missing(client: Client, missing: dict[str, Path], found: dict[str, str], onlooker: Onlooker) -> None:
    for sha256, answer in _at_once(lambda file: _scan_id(client, file), dict(missing), "sending", onlooker):
        file = missing.pop(sha256)
        if isinstance(answer, ApiError):
            onlooker.refused(file, answer)
        else:
            found[sha256] = answer


def _hashed(files: Sequence[Path], onlooker: Onlooker) -> list[str]:
    found = dict(_at_once(_sha256, dict(enumerate(files)), "hashing", onlooker))
    return [found[number] for number in range(len(files))]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scan_id(client: Client, file: Path) -> str | ApiError:
    """The id of a stored scan, or why it is none."""
    upload = Upload("file", [file])
    # Its bytes are its key. Another would only be waited for, a minute long, where a server died with it.
    headers = {"Content-Type": upload.content_type, "Idempotency-Key": None}
    try:
        return str(client.call("POST", "/scans", data=upload, headers=headers)["id"])
    except ApiError as error:
        if error.status not in (413, 422):
            raise
        return error


def _at_once(
    do: Callable[[Path], T], files: dict[Any, Path], stage: str, onlooker: Onlooker
) -> Iterator[tuple[Any, T]]:
    """Do it with all files, some at a time; the first error ends it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        keys = {pool.submit(do, file): key for key, file in files.items()}
        try:
            for done, future in enumerate(as_completed(keys), 1):
                yield keys[future], future.result()
                onlooker.moved(stage, done / len(keys))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def uploaded(client: Client, file: Path, onlooker: Onlooker) -> str:
    """The id of the file's upload, once it is whole.

    Raises:
        ApiError: it was refused, or did not move on for `PATIENCE_SECONDS`.
    """
    size, name = file.stat().st_size, base64.b64encode(file.name.encode()).decode()
    headers = {**TUS, "Upload-Length": str(size), "Upload-Metadata": f"filename {name}"}
    upload_id = str(client.call("POST", "/uploads", headers=headers)["id"])
    at, patience = 0, Patience(ELSEWHERE)
    while True:
        try:
            at = _offset(client, upload_id)
            onlooker.moved("sending", at / size)
            if at == size:
                return upload_id
            _send_piece(client, upload_id, Piece(file, at, min(PIECE_BYTES, size - at)), at)
        except ApiError as error:
            patience.wait(error, at)


def _offset(client: Client, upload_id: str) -> int:
    return int(client.answer("HEAD", f"/uploads/{upload_id}", headers=TUS).headers["Upload-Offset"])


def _send_piece(client: Client, upload_id: str, piece: Piece, start: int) -> None:
    headers = {**TUS, "Upload-Offset": str(start), "Content-Type": "application/offset+octet-stream"}
    client.answer("PATCH", f"/uploads/{upload_id}", data=piece, headers=headers)
