"""The report's section about subgroups of the test scans."""

from __future__ import annotations

from collections.abc import Iterator

from ml.evaluation.metrics import Scores
from ml.evaluation.subgroups import TITLES, TOO_FEW
from ml.reporting.sections import Section, Table
from ml.spec.operating_point import MIN_GROUPS


def subgroups(scores: Scores) -> Iterator[Section]:
    """The section; none if nothing is known of the scans to divide them by."""
    if scores.subgroups:
        yield Section("Subgroups of the test scans", tuple(_reading(scores)), (_table(scores),))


def _reading(scores: Scores) -> Iterator[str]:
    warnings = [f"{one['trait']} {one['value']}: {one['warning']}" for one in scores.subgroups if one["warning"]]
    yield from (f"Mind {warning}" for warning in warnings)
    if not warnings:
        yield "No subgroup differs from the others by more than chance; small differences would not be seen."
    yield (
        f"A figure needs {MIN_GROUPS} independent groups (patients, where known) of its class. Differences are "
        "tested together at a level of 5 %. Values are those of DICOM headers and of the columns of patients.csv; "
        "sites are pseudonyms, and values of columns that fewer than five patients share are not told."
    )


def _table(scores: Scores) -> Table:
    names = list(scores.subgroups[0]["figures"])
    rows = tuple(
        (
            f"{one['trait']}: {one['value']}",
            str(one["groups"]),
            str(one["scans"]),
            *(_cell(one["figures"][name]) for name in names),
        )
        for one in scores.subgroups
    )
    return Table(("Subgroup", "Groups", "Scans", *(TITLES[name] for name in names)), rows, "With 95 % intervals.")


def _cell(figure: list[float] | None) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*figure) if figure else TOO_FEW
