"""Uploads that come in pieces: the row says whose one is and how large it will be, its file how much of it is here.

Whoever changes or uses a file holds its lock (flock), so that a piece, a deletion and a use never meet. The file goes
before its row: a process that dies in between leaves a row without a file, which is as good as none.
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
from jobs.db import NOW, seconds
from jobs.errors import TooLarge, UploadBusy, UploadIncomplete, UploadNotFound
from jobs.storage.blobs import sync
from jobs.tables import Upload

Made = TypeVar("Made")
UPLOADS = "uploads"
BLOCK = 64 * 1024
"""Bytes read at a time: of a connection that is reset, at most so many are lost that had arrived."""
PRUNE_BATCH = 100


@dataclass(frozen=True)
class LockedUpload:
    """An upload that nobody else touches."""

    upload: Upload
    file: IO[bytes]

    @property
    def offset(self) -> int:
        """Bytes that are here."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, stream: IO[bytes]) -> None:
        """Add what the stream gives, to the declared size at most; what came before it broke stays."""
        self.file.seek(0, os.SEEK_END)
        missing = self.upload.size - self.offset
        while missing and (block := stream.read(min(BLOCK, missing))):
            self.file.write(block)
            missing -= len(block)
        self.file.flush()
        os.fsync(self.file.fileno())

    def whole(self) -> FileStorage:
        """All of it, as if it had come in one request.

        Raises:
            UploadIncomplete
        """
        if self.offset < self.upload.size:
            raise UploadIncomplete(offset=self.offset, size=self.upload.size, id=self.upload.id)
        self.file.seek(0)
        return FileStorage(self.file, self.upload.name or "")  # without one it would take its path for it

    def remove(self) -> None:
        """Forget it."""
        _path(self.upload.id).unlink()
        _forget([self.upload.id])


def create(size: int, name: str | None) -> Upload:
    """Begin an upload; older ones that were left lying are forgotten.

    Raises:
        TooLarge
    """
    settings = services().settings
    if size > settings.max_upload_bytes:
        raise TooLarge(limit=settings.max_upload_bytes, setting="RENALQ_MAX_UPLOAD_BYTES")
    prune_expired()
    with transaction() as session:
        upload = Upload(tenant_id=tenant(), size=size, name=name)
        session.add(upload)
    path = _path(upload.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    sync(path.parent)  # the folder holds the name (fsync(2))
    return upload


def find(upload_id: uuid.UUID) -> tuple[Upload, int]:
    """An upload, and how many bytes of it are here for good.

    Raises:
        UploadNotFound
    """
    upload = _mine(upload_id)
    try:
        offset = _path(upload_id).stat().st_size
        sync(_path(upload_id))
    except FileNotFoundError:
        raise UploadNotFound from None
    return upload, offset


@contextmanager
def lock_upload(upload_id: uuid.UUID) -> Iterator[LockedUpload]:
    """An upload, for this block alone.

    Raises:
        UploadNotFound, UploadBusy
    """
    upload = _mine(upload_id)
    with _locked(upload_id) as file:
        yield LockedUpload(upload, file)


def from_upload(field: str, many: bool = False) -> Callable[[Callable[[Any], Made]], Callable[[Any], Made]]:
    """Let a function of a body that takes a file in `field` take `upload_id` as well: it is used up when all went well.

    Args:
        many: the field is a list of files.
    """

    def decorate(make: Callable[[Any], Made]) -> Callable[[Any], Made]:
        @wraps(make)
        def wrapper(body: dict[str, Any]) -> Made:
            if "upload_id" not in body:
                return make(body)
            with lock_upload(body["upload_id"]) as upload:
                file = upload.whole()
                made = make({**body, field: [file] if many else file})
                upload.remove()
            return made

        return wrapper

    return decorate


def expires_at(upload: Upload) -> dt.datetime:
    """When it may be forgotten."""
    return upload.created_at + dt.timedelta(hours=services().settings.upload_hours)


def prune_expired() -> None:
    """Forget the oldest of those that have expired, some at a time. One that is being sent stays for now."""
    lifetime = seconds(services().settings.upload_hours * 3600)
    old = select(Upload.id).where(Upload.created_at < NOW - lifetime).order_by(Upload.created_at)
    with transaction() as session:
        ids = session.scalars(old.limit(PRUNE_BATCH)).all()
    _forget([upload_id for upload_id in ids if _freed(upload_id)])


def _freed(upload_id: uuid.UUID) -> bool:
    """Remove a file. Returns whether it is gone."""
    try:
        with _locked(upload_id):
            _path(upload_id).unlink()
    except UploadBusy:
        return False
    except UploadNotFound:
        pass
    return True


def _forget(ids: list[uuid.UUID]) -> None:
    if ids:
        with transaction() as session:
            session.execute(delete(Upload).where(Upload.id.in_(ids)))


def _mine(upload_id: uuid.UUID) -> Upload:
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
        if os.fstat(file.fileno()).st_nlink == 0:  # whoever had the lock has removed it
            raise UploadNotFound
        yield file


def _path(upload_id: uuid.UUID) -> Path:
    return services().settings.home / UPLOADS / str(upload_id)
