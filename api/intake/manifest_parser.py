"""Parse a manifest: CSV with a header row (comma, semicolon or tab), or NDJSON; UTF-8; a row is one line.

Lines are read one at a time, and errors of all lines are reported together, so that a client can fix them in one go.
"""

import csv
import io
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import IO, Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.bodies import pointers
from api.http.body import json_text
from api.http.fields import HttpUrl, exactly_one, find_unstorable
from api.http.problems import MAX_ERRORS, InvalidFields
from jobs.errors import Invalid, MalformedBody, TooLarge

SOURCES = ("file", "scan_id", "url")
"""Columns that identify a row's scan."""
MAX_LINE_BYTES = 64 * 1024
"""Longest line: a URL, a file name and three keys are shorter, however they are escaped."""
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",;\t"
KNOWN = (*SOURCES, "custom_id", "patient", "study")
COLUMNS = ", ".join(KNOWN)

Cells = dict[str, Any]


class ManifestRow(ma.Schema):
    """A row: a file sent along, a stored scan, or a URL to fetch it from."""

    file = fields.String(validate=validate.Length(1, 1000))
    scan_id = fields.UUID()
    url = HttpUrl()
    custom_id = fields.String(validate=validate.Length(1, 200))
    patient = fields.String(validate=validate.Length(1, 200))
    study = fields.String(validate=validate.Length(1, 200))

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        exactly_one(data, *SOURCES)


@dataclass(frozen=True, slots=True)
class Row:
    """A validated row with its line number; one of `file`, `scan_id` and `url` is set."""

    line: int
    file: str | None = None
    scan_id: uuid.UUID | None = None
    url: str | None = None
    custom_id: str | None = None
    patient: str | None = None
    study: str | None = None


class ErrorCollector:
    """Errors of a manifest: the first `MAX_ERRORS` are kept, the others counted."""

    def __init__(self) -> None:
        self._errors: list[tuple[str, str]] = []
        self._more = 0

    def add(self, pointer: str, why: str) -> None:
        """Add an error."""
        if len(self._errors) < MAX_ERRORS:
            self._errors.append((pointer, why))
        else:
            self._more += 1

    @contextmanager
    def collect(self, line: int) -> Iterator[None]:
        """Collect a ValidationError about a line, and go on after the block."""
        try:
            yield
        except ma.ValidationError as error:
            for pointer, why in pointers(error.messages, f"/manifest/{line}"):
                self.add(pointer, why)

    def raise_if_any(self) -> None:
        """Raise InvalidFields if there are errors."""
        if self._errors:
            raise InvalidFields(self._errors, self._more)


def parse_manifest(stream: IO[bytes], max_rows: int, errors: ErrorCollector) -> list[Row]:
    """The valid rows of a manifest of at most `max_rows`; errors of the others go to `errors`.

    Raises:
        InvalidFields: it is empty, or its header is wrong.
    """
    lines = enumerate(_lines(stream), 1)
    first = next(lines, None)
    if first is None:
        raise InvalidFields([("/manifest", "Is empty.")])
    is_json = first[1].removeprefix(BOM)[:1] in (b"{", b"[")
    headers = 0 if is_json else 1
    cells_of = _json_cells if is_json else _csv_cells(first[1], errors)
    schema, rows, line = ManifestRow(), [], headers
    for line, raw in chain([] if headers else [first], lines):
        if line > max_rows + headers:
            errors.add(f"/manifest/{line}", f"More than {max_rows} scans. Split the manifest.")
            break
        with errors.collect(line):
            rows.append(_row(line, schema.load(cells_of(_text(raw)), unknown=ma.RAISE)))
    if line == headers:
        errors.add("/manifest", "Names no scan.")
    return rows


def normalize_path(name: str) -> str:
    """A file's name with forward slashes and without `./`, to compare rows with uploads."""
    return str(PurePosixPath(name.replace("\\", "/")))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines; of one that is too long only its first `MAX_LINE_BYTES` + 1 bytes. The stream is read once."""
    stream.seek(0)
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]  # a Section's own readline reads byte by byte
    while line := buffered.readline(MAX_LINE_BYTES + 1):
        part = line
        while len(part) > MAX_LINE_BYTES and not part.endswith(b"\n"):
            part = buffered.readline(MAX_LINE_BYTES + 1)
        yield line


def _text(raw: bytes) -> str:
    if len(raw) > MAX_LINE_BYTES:
        raise ma.ValidationError(f"The line is longer than {MAX_LINE_BYTES} bytes.")
    try:
        text = raw.removeprefix(BOM).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ma.ValidationError("Not UTF-8. Save the manifest as UTF-8.") from None
    if not text.strip():
        raise ma.ValidationError("The line is empty. Remove it.")
    return text


def _row(line: int, cells: Cells) -> Row:
    for pointer, why in find_unstorable(cells):
        raise ma.ValidationError({pointer.removeprefix("/"): [why]})
    return Row(line, **{**cells, "file": normalize_path(cells["file"]) if "file" in cells else None})


def _json_cells(text: str) -> Cells:
    try:
        value = json_text.parse(text.encode())
    except (MalformedBody, TooLarge, Invalid):
        value = None
    if not isinstance(value, dict):
        raise ma.ValidationError('Not a JSON object. Write one a line, such as {"file": "1.png", "custom_id": "7"}.')
    _check_names(list(value))
    return {name: cell for name, cell in value.items() if cell is not None}


def _csv_cells(header: bytes, errors: ErrorCollector) -> Callable[[str], Cells]:
    """A function that parses the lines below this header.

    Raises:
        InvalidFields: the header is wrong.
    """
    names: list[str] = []
    delimiter = DELIMITERS[0]
    with errors.collect(1):
        text = _text(header)
        delimiter = max(DELIMITERS, key=text.count)  # no column name contains one
        names = [name.strip() for name in _split(text, delimiter)]
        _check_names(names)
        if not set(names) & set(SOURCES):
            raise ma.ValidationError(f"The header needs a column {', '.join(SOURCES)}, or several of them.")
    errors.raise_if_any()
    return partial(_csv_row, names, delimiter)


def _check_names(names: list[str]) -> None:
    unknown = {name: [f"Unknown column {name[:40]!r}: use {COLUMNS}."] for name in names if name not in KNOWN}
    double = {name: ["Given more than once."] for name in KNOWN if names.count(name) > 1}
    if unknown or double:
        raise ma.ValidationError(unknown | double)  # type: ignore[arg-type]


def _csv_row(names: Sequence[str], delimiter: str, text: str) -> Cells:
    cells = _split(text, delimiter)
    if not any(cell.strip() for cell in cells):
        raise ma.ValidationError("The row is empty. Remove it.")
    if len(cells) != len(names):
        raise ma.ValidationError(f"Has {len(cells)} cells, but the header has {len(names)}.")
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _split(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error:
        raise ma.ValidationError("Not valid CSV: look at its quotes. A row is one line.") from None
