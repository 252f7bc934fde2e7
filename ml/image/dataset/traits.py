"""Traits of scans, of which subgroups are made: scanner, site, sex, age and slice thickness of DICOM, and what other
columns of `patients.csv` say.

They come into reports, so no trait may tell who somebody is: a site is a pseudonym, ages and thicknesses are bands, and
a value of patients.csv that few patients share is not told.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from ml.image.dataset.patients import pseudonym
from ml.image.dataset.scan import ScanFile

if TYPE_CHECKING:
    from pydicom import Dataset

SCANNER, SITE, SEX, AGE, THICKNESS = "scanner", "site", "sex", "age", "slice thickness"
FROM_DICOM = frozenset((SCANNER, SITE, SEX, AGE, THICKNESS))
NOT_KNOWN, OTHER = "not known", "other values"
MOST_VALUES = 12
"""Values of a trait that are told apart: those that most patients have. A column of more numbers is cut in thirds."""
LEAST_SHARING = 5
"""Patients who must share a value of patients.csv for it to be told: a column may hold names (k-anonymity, Sweeney
2002)."""
_LONGEST = 60  # characters
_AGES = (18, 40, 60, 80)
_THICKNESSES = (1.5, 3.0, 5.0)
_AGE = re.compile(r"(\d{1,3})([DWMY])", re.IGNORECASE)
_YEARS = {"d": 365.25, "w": 52.18, "m": 12.0, "y": 1.0}  # of them in a year
_SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "w": "F", "o": "O", "other": "O"}


def read_traits(dataset: Dataset) -> dict[str, str]:
    """The traits that a DICOM header tells; those that it does not, or not readably, are missing.

    A scan of a dataset has one frame, whose thickness newer files keep in its functional group (PS3.3 C.7.6.16).
    """
    from ml.image.pixels.frame_attributes import thickness_mm

    maker, scanner = (_text(dataset, tag) for tag in ("Manufacturer", "ManufacturerModelName"))
    site = _text(dataset, "InstitutionName") or _text(dataset, "StationName")
    age, thickness = _AGE.fullmatch(_text(dataset, "PatientAge")), thickness_mm(dataset, 0)
    found = {
        SCANNER: scanner if scanner.lower().startswith(maker.lower()) else f"{maker} {scanner}",
        SITE: site and f"site {pseudonym(f'site {site}')[:8]}",
        SEX: _SEXES.get(_text(dataset, "PatientSex").lower(), ""),
        AGE: age and age_band(int(age[1]) / _YEARS[age[2].lower()]),
        THICKNESS: thickness is not None and _band(thickness, _THICKNESSES, " mm"),
    }
    return {name: value.strip()[:_LONGEST] for name, value in found.items() if value and value.strip()}


def listed_traits(cells: Mapping[str, str]) -> dict[str, str]:
    """The traits in a row of patients.csv: its cells by column, without those that have a meaning of their own."""
    named = {column.replace("_", " ")[:_LONGEST]: " ".join(cell.split())[:_LONGEST] for column, cell in cells.items()}
    return {column: _as_trait(column, cell) for column, cell in named.items() if column and cell}


def age_band(years: float) -> str:
    """Under 18, 18 to 39, 40 to 59, 60 to 79, or 80 and older."""
    if years < _AGES[0]:
        return f"under {_AGES[0]}"
    if years >= _AGES[-1]:
        return f"{_AGES[-1]} and older"
    at = next(index for index, bound in enumerate(_AGES) if years < bound)
    return f"{_AGES[at - 1]} to {_AGES[at] - 1}"


def subgroup_values(scans: Sequence[ScanFile]) -> list[dict[str, str]]:
    """Each scan's value of each trait that any of the scans has, as it may be told.

    Left out are columns of patients.csv of which no value may be told.
    """
    names = sorted({name for scan in scans for name in scan.traits})
    columns = {name: _told(name, [scan.traits.get(name, NOT_KNOWN) for scan in scans], scans) for name in names}
    kept = {name: values for name, values in columns.items() if set(values) - {NOT_KNOWN, OTHER}}
    return [{name: values[index] for name, values in kept.items()} for index in range(len(scans))]


def _told(name: str, values: list[str], scans: Sequence[ScanFile]) -> list[str]:
    if len(set(values)) > MOST_VALUES:
        values = _thirds(values)
    owners: dict[str, set[str]] = {}
    for value, scan in zip(values, scans, strict=True):
        owners.setdefault(value, set()).add(scan.patient or scan.study or scan.sha256)
    least = 1 if name in FROM_DICOM else LEAST_SHARING
    most = sorted((value for value in owners if value != NOT_KNOWN), key=lambda value: (-len(owners[value]), value))
    told = {value for value in most[:MOST_VALUES] if len(owners[value]) >= least} | {NOT_KNOWN}
    return [value if value in told else OTHER for value in values]


def _thirds(values: list[str]) -> list[str]:
    """Bands of a column of numbers; the same values if it has others."""
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < sum(value != NOT_KNOWN for value in values):
        return values
    bounds = quantiles(known, n=3, method="inclusive")
    return [NOT_KNOWN if number is None else _band(number, bounds) for number in numbers]


def _band(number: float, bounds: Sequence[float], unit: str = "") -> str:
    at = bisect_left(bounds, number)
    if at == 0:
        return f"up to {bounds[0]:g}{unit}"
    low = f"over {bounds[at - 1]:g}{unit}"
    return low if at == len(bounds) else f"{low.removesuffix(unit)} to {bounds[at]:g}{unit}"


def _as_trait(column: str, cell: str) -> str:
    if column == SEX:
        return _SEXES.get(cell.lower(), cell)
    number = _number(cell)
    if column == AGE and number is not None:
        return age_band(number)
    if column == THICKNESS and number is not None:
        return _band(number, _THICKNESSES, " mm")
    return cell


def _number(text: str) -> float | None:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None  # nan is not less


def _text(dataset: Dataset, keyword: str) -> str:
    try:
        value: Any = dataset.get(keyword)
    except Exception:  # a value that breaks its representation; pydicom raises all kinds
        return ""
    return "" if value is None else " ".join(str(value).replace("\0", " ").split())
