"""Incoming scans: inspected, stored once under their content hash, registered once for each tenant."""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import IO

from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage

from api.http.context import Services, services, tenant, transaction
from api.intake.storage_room import StorageRoom, storage_room
from jobs.db import Sessions
from jobs.errors import BadInput, Invalid, RenalQError, ScanNotFound, StorageQuotaExceeded, TooLarge
from jobs.queue.submission import NewResult
from jobs.results import scan_registry
from jobs.settings import Settings
from jobs.storage.archives import Member
from jobs.storage.blobs import Blob
from jobs.tables import Scan, new_id
from ml.spec.pipeline import Inputs, Media, RefusedInput

MAX_SCANS = 10_000
"""Most scans in one request."""
REGISTER_BATCH = 200
"""Scans registered in one transaction."""
WRITERS = 8
"""Threads that write scans: each write waits for the disk twice, and a disk serves many writes at once."""
MAX_NAME_LENGTH = 500


@dataclass(frozen=True)
class IncomingScan:
    """A scan of a request. `open` gives its bytes; it may raise `Invalid`."""

    name: str | None
    custom_id: str | None
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class StoreOutcome:
    """A stored scan, or the error."""

    incoming: IncomingScan
    blob: Blob | None = None
    media: Media | None = None
    error: RenalQError | None = None


def inspect_scan(stream: IO[bytes], inputs: Inputs, pointer: str | None = None) -> Media:
    """The media type and size of a scan, from its header. `pointer` names its field in the request.

    Raises:
        BadInput, TooLarge
    """
    try:
        return _inspect(services().settings, inputs, stream)
    except BadInput as error:
        error.pointer = pointer
        raise


def store_scan(stream: IO[bytes], media: Media) -> tuple[Scan, bool]:
    """Store an inspected scan. Returns it, and whether it is new.

    Raises:
        StorageQuotaExceeded
    """
    storage_room().take(_size(stream), partial(_is_stored, services().sessions, tenant(), stream))
    blob = services().blobs.put(stream)
    with transaction() as session:
        wanted = new_id()
        scan_registry.register(session, [_row(blob, media, wanted)])
        found = scan_registry.by_hash(session, tenant(), [blob.sha256])[blob.sha256]
        return session.get_one(Scan, found), found == wanted


def store_scans(scans: Iterable[IncomingScan], inputs: Inputs) -> list[NewResult]:
    """Store many scans. One that the pipeline cannot read becomes a failed result; the others are stored.

    Raises:
        StorageQuotaExceeded: those that fit are stored, so that they count.
    """
    results: list[NewResult] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for batch in _batched(scans, REGISTER_BATCH):
            outcomes = list(pool.map(partial(_store, services(), inputs, storage_room(), tenant()), batch))
            ids = _registered([(one.blob, one.media) for one in outcomes if one.blob and one.media])
            for error in (one.error for one in outcomes if isinstance(one.error, StorageQuotaExceeded)):
                raise error
            results += [_result(one, ids) for one in outcomes]
    return results


def _registered(stored: Sequence[tuple[Blob, Media]]) -> dict[str, uuid.UUID]:
    with transaction() as session:
        scan_registry.register(session, [_row(blob, media, new_id()) for blob, media in stored])
        return scan_registry.by_hash(session, tenant(), [blob.sha256 for blob, _ in stored])


def results_of_stored(
    session: Session, scan_ids: Sequence[uuid.UUID], custom_ids: Sequence[str] = ()
) -> list[NewResult]:
    """Results to compute for scans that are stored already.

    Raises:
        ScanNotFound
    """
    frames = scan_registry.frames(session, tenant(), scan_ids)
    unknown = set(scan_ids) - frames.keys()
    if unknown:
        raise ScanNotFound(f"No scan has the id {min(unknown)}. Store it with POST /scans.")
    given: Sequence[str | None] = custom_ids or [None] * len(scan_ids)
    return [
        NewResult(scan_id, custom_id=own, frames=frames[scan_id]) for scan_id, own in zip(scan_ids, given, strict=True)
    ]


def from_files(files: Sequence[FileStorage], custom_ids: Sequence[str] = ()) -> Iterator[IncomingScan]:
    """The files of a multipart body."""
    for number, file in enumerate(files):
        own = custom_ids[number] if custom_ids else None
        yield IncomingScan(file_name(file), own, partial(getattr, file, "stream"))


def from_zip(members: Iterable[Member]) -> Iterator[IncomingScan]:
    """The files of a zip."""
    for member in members:
        yield IncomingScan(printable_name(member.name), None, member.open)


def file_name(file: FileStorage) -> str | None:
    """An uploaded file's name without the folders that some clients send along."""
    return printable_name(PurePosixPath((file.filename or "").replace("\\", "/")).name)


def printable_name(name: str) -> str | None:
    """A file's name that may be stored and shown: printable characters, the last `MAX_NAME_LENGTH`."""
    printable = "".join(character if character.isprintable() else "�" for character in name)
    return printable[-MAX_NAME_LENGTH:] or None


def _store(shared: Services, inputs: Inputs, room: StorageRoom, owner: str, incoming: IncomingScan) -> StoreOutcome:
    try:
        stream = incoming.open()
        media = _inspect(shared.settings, inputs, stream)
        room.take(_size(stream), partial(_is_stored, shared.sessions, owner, stream))
    except (Invalid, TooLarge, StorageQuotaExceeded) as error:
        return StoreOutcome(incoming, error=error)
    return StoreOutcome(incoming, shared.blobs.put(stream), media)


def _is_stored(sessions: Sessions, owner: str, stream: IO[bytes]) -> bool:
    """Whether the tenant has this scan already."""
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    stream.seek(0)
    with sessions.begin() as session:
        return bool(scan_registry.by_hash(session, owner, [digest]))


def _inspect(settings: Settings, inputs: Inputs, stream: IO[bytes]) -> Media:
    if _size(stream) > settings.max_scan_bytes:
        raise TooLarge(limit=settings.max_scan_bytes, setting="RENALQ_MAX_SCAN_BYTES")
    try:
        return inputs.look(stream, settings.max_pixels)
    except RefusedInput as refusal:
        raise BadInput(str(refusal) or inputs.refusal, inputs.refusal_code) from None


def _result(one: StoreOutcome, ids: dict[str, uuid.UUID]) -> NewResult:
    name, own = one.incoming.name, one.incoming.custom_id
    if one.blob is None or one.media is None:
        return NewResult(None, name, own, error=_failure(one.error or BadInput()))
    return NewResult(ids[one.blob.sha256], name, own, frames=one.media.frames)


def _failure(error: RenalQError) -> dict[str, object]:
    return {"code": error.code, "detail": str(error), "retryable": False}


def _row(blob: Blob, media: Media, scan_id: uuid.UUID) -> dict[str, object]:
    return {"id": scan_id, "tenant_id": tenant(), "sha256": blob.sha256, "size": blob.size, **media._asdict()}


def _size(stream: IO[bytes]) -> int:
    size = stream.seek(0, 2)
    stream.seek(0)
    return size


def _batched(scans: Iterable[IncomingScan], number: int) -> Iterator[list[IncomingScan]]:
    rest = iter(scans)
    while batch := list(islice(rest, number)):
        yield batch
