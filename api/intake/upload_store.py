"""Resumable uploads: the row has owner and declared size, the file has the bytes received so far.

Every change or use of a file holds its lock (flock), so that appending, deleting and reading exclude each other. The
file is deleted before its row: a process that dies in between leaves a row without a file, which reads as not found.
"""

import datetime as dt
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

from sqlalchemy import delete, select
from werkzeug.datastructures import FileStorage

from api.http.context import services, tenant, transaction
from api.intake.storage_room import release_after_success, reserve
from jobs.db import NOW, seconds
from jobs.errors import TooLarge, UploadBusy, UploadIncomplete, UploadNotFound
from jobs.storage.blobs import sync
from jobs.tables import Upload

Result = TypeVar("Result")
UPLOADS = "uploads"
BLOCK = 64 * 1024
"""Bytes read at a time: when a connection is reset, at most this many received bytes are lost."""
PRUNE_BATCH = 100


@dataclass(frozen=True)
class LockedUpload:
    """An upload and its file, which no other request can change meanwhile."""

    upload: Upload
    file: IO[bytes]

    @property
    def offset(self) -> int:
        """Bytes received so far."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, stream: IO[bytes]) -> None:
        """Append the stream, up to the declared size. If it breaks, the bytes before are kept."""
        self.file.seek(0, os.SEEK_END)
        missing = self.upload.size - self.offset
        while missing and (block := stream.read(min(BLOCK, missing))):
            self.file.write(block)
            missing -= len(block)
        self.file.flush()
        os.fsync(self.file.fileno())

    def whole(self) -> FileStorage:
        """The complete file, as if it had come in one multipart body.

        Raises:
            UploadIncomplete
        """
        if self.offset < self.upload.size:
            raise UploadIncomplete(offset=self.offset, size=self.upload.size, id=self.upload.id)
        self.file.seek(0)
        return FileStorage(self.file, self.upload.name or "")  # None would become the path

    def remove(self) -> None:
        """Delete it."""
        _path(self.upload.id).unlink()
        _delete_rows([self.upload.id])


def create(size: int, name: str | None) -> Upload:
    """Create an upload, and delete expired ones.

    Raises:
        TooLarge, StorageQuotaExceeded
    """
    settings = services().settings
    if size > settings.max_upload_bytes:
        raise TooLarge(limit=settings.max_upload_bytes, setting="RENALQ_MAX_UPLOAD_BYTES")
    prune_expired()
    with transaction() as session:
        reserve(session, size)
        upload = Upload(tenant_id=tenant(), size=size, name=name)
        session.add(upload)
    path = _path(upload.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    sync(path.parent)  # the name is stored in the folder (fsync(2))
    return upload


def find(upload_id: uuid.UUID) -> tuple[Upload, int]:
    """An upload, and how many of its bytes are stored durably.

    Raises:
        UploadNotFound
    """
    upload = _find_row(upload_id)
    try:
        offset = _path(upload_id).stat().st_size
        sync(_path(upload_id))
    except FileNotFoundError:
        raise UploadNotFound from None
    return upload, offset


@contextmanager
def lock_upload(upload_id: uuid.UUID) -> Iterator[LockedUpload]:
    """An upload, locked for the length of the block.

    Raises:
        UploadNotFound, UploadBusy
    """
    upload = _find_row(upload_id)
    with _locked(upload_id) as file:
        yield LockedUpload(upload, file)


def from_upload(field: str, many: bool = False) -> Callable[[Callable[[Any], Result]], Callable[[Any], Result]]:
    """Let a function of a body with a file in `field` accept an `upload_id` instead. On success the upload is deleted.

    Args:
        field: name of the file in the body.
        many: the field is a list of files.
    """

    def decorate(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
        @wraps(function)
        def wrapper(body: dict[str, Any]) -> Result:
            if "upload_id" not in body:
                return function(body)
            with lock_upload(body["upload_id"]) as upload:
                file = upload.whole()
                release_after_success(upload.upload.size)
                result = function({**body, field: [file] if many else file})
                upload.remove()
            return result

        return wrapper

    return decorate


def expires_at(upload: Upload) -> dt.datetime:
    """When it is deleted."""
    return upload.created_at + dt.timedelta(hours=services().settings.upload_hours)


def prune_expired() -> None:
    """Delete the oldest expired uploads, `PRUNE_BATCH` at most. One that is locked stays for now."""
    lifetime = seconds(services().settings.upload_hours * 3600)
    old = select(Upload.id).where(Upload.created_at < NOW - lifetime).order_by(Upload.created_at)
    with transaction() as session:
        ids = session.scalars(old.limit(PRUNE_BATCH)).all()
    _delete_rows([upload_id for upload_id in ids if _delete_file(upload_id)])


def _delete_file(upload_id: uuid.UUID) -> bool:
    """Delete the file unless it is locked. Returns whether it is gone."""
    try:
        with _locked(upload_id):
            _path(upload_id).unlink()
    except UploadBusy:
        return False
    except UploadNotFound:
        pass
    return True


def _delete_rows(ids: list[uuid.UUID]) -> None:
    if ids:
        with transaction() as session:
            session.execute(delete(Upload).where(Upload.id.in_(ids)))


def _find_row(upload_id: uuid.UUID) -> Upload:
    with transaction() as session:
        found = session.scalar(select(Upload).where(Upload.id == upload_id, Upload.tenant_id == tenant()))
    if found is None:
        raise UploadNotFound
    return found


@contextmanager
def _locked(upload_id: uuid.UUID) -> Iterator[IO[bytes]]:
    try:
        file = _path(upload_id).open("r+b")
    except FileNotFoundError:
        raise UploadNotFound from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UploadBusy from None
        if os.fstat(file.fileno()).st_nlink == 0:  # it was deleted while we waited for the lock
            raise UploadNotFound
        yield file


def _path(upload_id: uuid.UUID) -> Path:
    return services().settings.home / UPLOADS / str(upload_id)
