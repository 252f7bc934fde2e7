"""Manifests: a list says which scans a batch has, and what they are called at the client's."""

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
from jobs.results.queries import known_scans
from jobs.storage.archives import Limits, Member

IN_A_ZIP = ("manifest.csv", "manifest.ndjson")
"""A zip's own manifest, beside its folders."""
NO_HOSTS = (
    "Scans are not fetched from addresses here: RENALQ_FETCH_HOSTS names no host. Store the scan with POST /scans, and "
    "name its scan_id."
)

Open = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Manifest:
    """A batch's rows, and the files that came with them by the names that the rows give them."""

    rows: list[Row]
    files: Mapping[str, Open]

    def results(self) -> list[NewResult]:
        """Store the files. Returns what the job must do, in the order of the rows."""
        sent = (
            scan_store.Incoming(scan_store.shown_name(row.file), None, self.files[row.file])
            for row in self.rows
            if row.file
        )
        stored = iter(scan_store.keep_all(sent))
        return [_result(row, stored) for row in self.rows]


def of(given: FileStorage | None, files: Sequence[FileStorage], members: Sequence[Member] | None) -> Manifest | None:
    """The manifest that was given, or that lies in the zip, checked against what came with it; None without one.

    Args:
        members: those of the zip, if that is what was sent.

    Raises:
        InvalidFields, BadArchive
    """
    own = [member for member in members or () if member.name in IN_A_ZIP]
    if given is None and not own:
        return None
    if len(own) + (given is not None) > 1:
        raise InvalidFields([("/manifest", "Given more than once: as a part, or as manifest.csv or .ndjson in a zip.")])
    most = MAX_SCANS if members is None else Limits.of(services().settings).members
    complaints = ErrorCollector()
    rows = parse_manifest(own[0].open() if given is None else given.stream, most, complaints)
    complaints.raise_any()  # a line that cannot be read may name a file: whether it is missing is not known yet
    sent = _uploaded(files, complaints) if members is None else {m.name: m.open for m in members if m not in own}
    found = Manifest(rows, sent)
    _check_files(found, complaints)
    _check_scans(found.rows, complaints)
    _check_addresses(found.rows, complaints)
    complaints.raise_any()
    return found


# --- rows against what they name ---


def _uploaded(files: Sequence[FileStorage], complaints: ErrorCollector) -> dict[str, Open]:
    found: dict[str, Open] = {}
    for file in files:
        name = normalize_path(file.filename or "")
        if name in found:
            complaints.add("/files", f"Two files are named {name!r}. Give each a name of its own.")
        found[name] = partial(getattr, file, "stream")
    return found


def _check_files(manifest: Manifest, complaints: ErrorCollector) -> None:
    lines: dict[str, int] = {}
    for row in manifest.rows:
        if row.file is None:
            continue
        if row.file not in manifest.files:
            complaints.add(f"/manifest/{row.line}/file", "No file of this name came with the manifest.")
        elif row.file in lines:  # files are read by several threads: no two may read the same
            complaints.add(f"/manifest/{row.line}/file", f"Named on line {lines[row.file]} already.")
        lines.setdefault(row.file, row.line)
    for name in manifest.files:
        if name not in lines:
            complaints.add("/files", f"{name!r} is not in the manifest. List it there, or leave it out.")


def _check_scans(rows: Sequence[Row], complaints: ErrorCollector) -> None:
    named = {row.scan_id for row in rows if row.scan_id}
    if not named:
        return
    with transaction() as session:
        known = known_scans(session, tenant(), list(named))
    for row in rows:
        if row.scan_id and row.scan_id not in known:
            complaints.add(f"/manifest/{row.line}/scan_id", "No scan has this id. Store it with POST /scans.")


def _check_addresses(rows: Sequence[Row], complaints: ErrorCollector) -> None:
    hosts = services().settings.allowed_hosts
    for row in rows:
        if row.url and (why := fetch_url_error(row.url, hosts) if hosts else NO_HOSTS):
            complaints.add(f"/manifest/{row.line}/url", why)


# --- rows into results ---


def _result(row: Row, stored: Iterator[NewResult]) -> NewResult:
    found = next(stored) if row.file else NewResult(row.scan_id, _name(row.url), source_url=row.url)
    return replace(found, custom_id=row.custom_id, patient=row.patient, study=row.study)


def _name(url: str | None) -> str | None:
    """An address's file, without its folders and its query."""
    return scan_store.shown_name(PurePosixPath(unquote(urlsplit(url).path)).name) if url else None
