"""`patients.csv` in a dataset: who is whose patient, said by whoever made the dataset. It overrules everything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ml.image.dataset.layout import Layout, side_of
from ml.image.dataset.traits import listed_traits
from ml.spec.junk_files import PATIENT_LIST
from ml.spec.zips import safe_part

_COLUMNS = ("path", "patient", "study", "label", "split")
_MOST_BYTES = 64 * 2**20
_MOST_PROBLEMS = 20  # that are listed; the rest is only counted


@dataclass(frozen=True)
class Listed:
    """A row: what is said about one scan. `side`: train, validation or test. `traits`: the other columns."""

    patient: str
    study: str | None = None
    label: str | None = None
    side: str | None = None
    traits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PatientList:
    """The rows by the names of their scans, and problems that name the row."""

    rows: dict[str, Listed] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        """The labels by names of scans, where the list has any."""
        return {name: row.label for name, row in self.rows.items() if row.label}


def read_patient_list(layout: Layout) -> PatientList:
    """The list that lies nearest to the top; an empty one if there is none.

    UTF-8 with a header row; comma, semicolon or tab. `path` is relative to the folder of the list, or to the top.
    """
    found = sorted((name for name in layout.others if PurePosixPath(name).name.lower() == PATIENT_LIST), key=_depth)
    if not found:
        return PatientList()
    if len(found) > 1 and _depth(found[1]) == _depth(found[0]):
        return PatientList(problems=(f"{found[0]} and {found[1]} are two lists of patients: keep one of them.",))
    return _parsed(layout, found[0])


def _depth(name: str) -> int:
    return name.count("/")


def _parsed(layout: Layout, file: str) -> PatientList:
    known = {_stored(place.name): place.name for place in layout.places}
    rows: dict[str, Listed] = {}
    problems: list[str] = []
    try:
        for line, cells in _cells(layout.folder / file):
            try:
                name = _name(cells.get("path", ""), file.rpartition("/")[0], known)
                if name in rows:
                    raise ValueError("the scan has a row already.")
                rows[name] = _listed(cells)
            except ValueError as error:
                problems.append(f"{file}, row {line}: {error}")
    except ValueError as error:
        return PatientList(problems=(f"{file}: {error}",))
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{file}: {len(problems) - _MOST_PROBLEMS} more rows are wrong."]
    return PatientList(rows, tuple(problems))


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column, of each row that is not empty. ValueError if it is no such table."""
    content = path.read_bytes()
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8: save it as CSV UTF-8.") from None
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in _COLUMNS[:2] if name not in names]:
        raise ValueError(f"its first row lacks {' and '.join(missing)}; the columns are {', '.join(_COLUMNS)}.")
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, dict(zip(names, (cell.strip() for cell in row), strict=False))
    except csv.Error as error:
        raise ValueError(f"row {reader.line_num} cannot be read as CSV.") from error


def _stored(path: str) -> str:
    """The path as it is stored when a zip is unpacked."""
    return "/".join(safe_part(part) for part in path.replace("\\", "/").split("/") if part not in ("", "."))


def _name(path: str, folder: str, known: Mapping[str, str]) -> str:
    """The scan that a path means. ValueError if there is none."""
    if not path:
        raise ValueError("path is empty.")
    for name in (_stored(f"{folder}/{path}"), _stored(path)):
        if name in known:
            return known[name]
    raise ValueError(f"there is no scan {path!r}.")


def _listed(cells: dict[str, str]) -> Listed:
    patient, split = cells.get("patient", ""), cells.get("split", "")
    if not patient:
        raise ValueError("patient is empty.")
    if split and side_of(split) is None:
        raise ValueError(f"split must be train, validation or test, not {split!r}.")
    traits = listed_traits({column: cell for column, cell in cells.items() if column not in _COLUMNS})
    side = side_of(split) if split else None
    return Listed(patient, cells.get("study") or None, cells.get("label") or None, side, traits)
