"""Manifests: lists of a batch's scans with the client's own ids."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

from werkzeug.datastructures import FileStorage

from api.http.context import services, tenant, transaction
from api.http.problems import InvalidFields
from api.intake import scan_store
from api.intake.manifest_parser import ErrorCollector, Row, normalize_path, parse_manifest
from api.intake.scan_store import MAX_SCANS
from jobs.addresses import fetch_url_error
from jobs.queue.submission import NewResult
from jobs.results import scan_registry
from jobs.storage.archives import Limits, Member
from ml.spec.pipeline import Inputs

ZIP_MANIFESTS = ("manifest.csv", "manifest.ndjson")
"""Names of a manifest at the top of a zip."""
Open = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Manifest:
    """A batch's rows, and the files that came with them by name."""

    rows: list[Row]
    files: Mapping[str, Open]

    def store_scans(self, inputs: Inputs) -> list[NewResult]:
        """Store the files. Returns the results to compute, in the order of the rows."""
        sent = (
            scan_store.IncomingScan(scan_store.printable_name(row.file), None, self.files[row.file])
            for row in self.rows
            if row.file
        )
        stored, frames = iter(scan_store.store_scans(sent, inputs)), _stored_frames(self.rows)
        return [_result(row, stored, frames) for row in self.rows]


def read_manifest(
    given: FileStorage | None, files: Sequence[FileStorage], members: Sequence[Member] | None
) -> Manifest | None:
    """The manifest, sent by itself or inside the zip, checked against the files that came with it; None without one.

    Args:
        given: the manifest sent by itself.
        files: uploaded files.
        members: files of the zip, if one was sent.

    Raises:
        InvalidFields, BadArchive
    """
    zipped = [member for member in members or () if member.name in ZIP_MANIFESTS]
    if given is None and not zipped:
        return None
    if len(zipped) + (given is not None) > 1:
        raise InvalidFields([("/manifest", "Given more than once: as a part, or as manifest.csv or .ndjson in a zip.")])
    max_rows = MAX_SCANS if members is None else Limits.of(services().settings).members
    errors = ErrorCollector()
    rows = parse_manifest(zipped[0].open() if given is None else given.stream, max_rows, errors)
    errors.raise_if_any()  # before the files are checked: an unreadable line may name one of them
    sent = _uploaded(files, errors) if members is None else {m.name: m.open for m in members if m not in zipped}
    found = Manifest(rows, sent)
    _check_files(found, errors)
    _check_scans(found.rows, errors)
    _check_urls(found.rows, errors)
    errors.raise_if_any()
    return found


# --- checks of rows ---


def _uploaded(files: Sequence[FileStorage], errors: ErrorCollector) -> dict[str, Open]:
    found: dict[str, Open] = {}
    for file in files:
        name = normalize_path(file.filename or "")
        if name in found:
            errors.add("/files", f"Two files are named {name!r}. Give each a name of its own.")
        found[name] = partial(getattr, file, "stream")
    return found


def _check_files(manifest: Manifest, errors: ErrorCollector) -> None:
    lines: dict[str, int] = {}
    for row in manifest.rows:
        if row.file is None:
            continue
        if row.file not in manifest.files:
            errors.add(f"/manifest/{row.line}/file", "No file of this name came with the manifest.")
        elif row.file in lines:  # files are read by several threads, each by one
            errors.add(f"/manifest/{row.line}/file", f"Named on line {lines[row.file]} already.")
        lines.setdefault(row.file, row.line)
    for name in manifest.files:
        if name not in lines:
            errors.add("/files", f"{name!r} is not in the manifest. List it there, or leave it out.")


def _check_scans(rows: Sequence[Row], errors: ErrorCollector) -> None:
    known = _stored_frames(rows)
    for row in rows:
        if row.scan_id and row.scan_id not in known:
            errors.add(f"/manifest/{row.line}/scan_id", "No scan has this id. Store it with POST /scans.")


def _stored_frames(rows: Sequence[Row]) -> dict[uuid.UUID, int]:
    """The number of frames of each stored scan that the rows name; none for one that is not there."""
    named = {row.scan_id for row in rows if row.scan_id}
    if not named:
        return {}
    with transaction() as session:
        return scan_registry.frames(session, tenant(), list(named))


def _check_urls(rows: Sequence[Row], errors: ErrorCollector) -> None:
    hosts = services().settings.allowed_hosts
    for row in rows:
        if row.url and (why := fetch_url_error(row.url, hosts)):
            errors.add(f"/manifest/{row.line}/url", why)


# --- rows into results ---


def _result(row: Row, stored: Iterator[NewResult], frames: Mapping[uuid.UUID, int]) -> NewResult:
    if row.file:
        found = next(stored)
    else:
        known = frames.get(row.scan_id, 1) if row.scan_id else 1
        found = NewResult(row.scan_id, _name(row.url), source_url=row.url, frames=known)
    return replace(found, custom_id=row.custom_id, patient=row.patient, study=row.study)


def _name(url: str | None) -> str | None:
    """The file name in a URL."""
    return scan_store.printable_name(PurePosixPath(unquote(urlsplit(url).path)).name) if url else None
