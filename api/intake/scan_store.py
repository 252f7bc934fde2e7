"""Scans on their way in: looked at, stored once under their content hash, registered once a tenant."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage

from api.http.context import Services, services, tenant, transaction
from jobs.errors import BadInput, Invalid, RenalQError, ScanNotFound, TooLarge
from jobs.queue.submission import NewResult
from jobs.results.queries import known_scans, scans_by_hash
from jobs.settings import Settings
from jobs.storage.archives import Member
from jobs.storage.blobs import Blob
from jobs.tables import Scan, new_id
from ml.spec.pipeline import Inputs, Media, RefusedInput

MAX_SCANS = 10_000
"""Most scans in one request."""
AT_ONCE = 200
"""Scans registered in one transaction."""
WRITERS = 8
"""Scans written at the same time: each waits for the disk twice, and the disk can do many at once."""
NAME_LENGTH = 500


@dataclass(frozen=True)
class Incoming:
    """A scan that somebody sent. `open` gives its bytes; it may raise `Invalid`."""

    name: str | None
    custom_id: str | None
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Seen:
    """A scan that is stored, or why it is not."""

    incoming: Incoming
    blob: Blob | None = None
    media: Media | None = None
    error: RenalQError | None = None


def check(stream: IO[bytes], inputs: Inputs, pointer: str | None = None) -> Media:
    """Look at a single scan. `pointer` names the field that it came in.

    Raises:
        BadInput, TooLarge
    """
    try:
        return _look(services().settings, inputs, stream)
    except BadInput as error:
        error.pointer = pointer
        raise


def keep(stream: IO[bytes], looked: Media) -> tuple[Scan, bool]:
    """Store a scan that was looked at. Returns it, and whether it is new."""
    blob = services().blobs.put(stream)
    with transaction() as session:
        wanted = new_id()
        _register(session, [_row(blob, looked, wanted)])
        found = scans_by_hash(session, tenant(), [blob.sha256])[blob.sha256]
        return session.get_one(Scan, found), found == wanted


def keep_all(scans: Iterable[Incoming], inputs: Inputs) -> list[NewResult]:
    """Store many scans. One that the pipeline cannot read becomes a result that has failed, and the others go on."""
    results: list[NewResult] = []
    see = partial(_see, services(), inputs)
    with ThreadPoolExecutor(WRITERS) as pool:
        for some in _batched(scans, AT_ONCE):
            seen = list(pool.map(see, some))
            ids = _registered([(one.blob, one.media) for one in seen if one.blob and one.media])
            results += [_result(one, ids) for one in seen]
    return results


def _registered(stored: Sequence[tuple[Blob, Media]]) -> dict[str, uuid.UUID]:
    with transaction() as session:
        _register(session, [_row(blob, looked, new_id()) for blob, looked in stored])
        return scans_by_hash(session, tenant(), [blob.sha256 for blob, _ in stored])


def known(session: Session, scan_ids: Sequence[uuid.UUID], custom_ids: Sequence[str] = ()) -> list[NewResult]:
    """Results for scans that are stored already.

    Raises:
        ScanNotFound
    """
    unknown = set(scan_ids) - known_scans(session, tenant(), scan_ids)
    if unknown:
        raise ScanNotFound(f"No scan has the id {min(unknown)}. Store it with POST /scans.")
    given: Sequence[str | None] = custom_ids or [None] * len(scan_ids)
    return [NewResult(scan_id, custom_id=own) for scan_id, own in zip(scan_ids, given, strict=True)]


def uploaded(files: Sequence[FileStorage], custom_ids: Sequence[str] = ()) -> Iterator[Incoming]:
    """The files of a multipart body."""
    for number, file in enumerate(files):
        own = custom_ids[number] if custom_ids else None
        yield Incoming(file_name(file), own, partial(getattr, file, "stream"))


def unpacked(members: Iterable[Member]) -> Iterator[Incoming]:
    """The files of a zip."""
    for member in members:
        yield Incoming(shown_name(member.name), None, member.open)


def file_name(file: FileStorage) -> str | None:
    """An uploaded file's name without the folders that some clients send along."""
    return shown_name(PurePosixPath((file.filename or "").replace("\\", "/")).name)


def shown_name(name: str) -> str | None:
    """A file's name as it may be stored and shown: printable, and not too long."""
    printable = "".join(character if character.isprintable() else "�" for character in name)
    return printable[-NAME_LENGTH:] or None


def _see(held: Services, inputs: Inputs, incoming: Incoming) -> Seen:
    try:
        stream = incoming.open()
        looked = _look(held.settings, inputs, stream)
    except (Invalid, TooLarge) as error:
        return Seen(incoming, error=error)
    return Seen(incoming, held.blobs.put(stream), looked)


def _look(settings: Settings, inputs: Inputs, stream: IO[bytes]) -> Media:
    if _size(stream) > settings.max_scan_bytes:
        raise TooLarge(limit=settings.max_scan_bytes, setting="RENALQ_MAX_SCAN_BYTES")
    try:
        return inputs.look(stream, settings.max_pixels)
    except RefusedInput as refusal:
        raise BadInput(str(refusal) or inputs.refusal, inputs.refusal_code) from None


def _result(one: Seen, ids: dict[str, uuid.UUID]) -> NewResult:
    name, own = one.incoming.name, one.incoming.custom_id
    if one.blob is None:
        return NewResult(None, name, own, error=_failure(one.error or BadInput()))
    return NewResult(ids[one.blob.sha256], name, own)


def _failure(error: RenalQError) -> dict[str, object]:
    return {"code": error.code, "detail": str(error), "retryable": False}


def _row(blob: Blob, looked: Media, scan_id: uuid.UUID) -> dict[str, object]:
    return {"id": scan_id, "tenant_id": tenant(), "sha256": blob.sha256, "size": blob.size, **looked._asdict()}


def _register(session: Session, rows: Sequence[dict[str, object]]) -> None:
    if rows:
        # In one order, so that two requests with the same scans cannot wait for each other.
        ordered = sorted(rows, key=lambda row: str(row["sha256"]))
        session.execute(insert(Scan).on_conflict_do_nothing(), ordered)


def _size(stream: IO[bytes]) -> int:
    size = stream.seek(0, 2)
    stream.seek(0)
    return size


def _batched(scans: Iterable[Incoming], number: int) -> Iterator[list[Incoming]]:
    some: list[Incoming] = []
    for one in scans:
        some.append(one)
        if len(some) == number:
            yield some
            some = []
    if some:
        yield some
