"""What a report consists of: sections of text, tables and plots."""

from __future__ import annotations

from dataclasses import dataclass

from ml.reporting.plots import Plot


@dataclass(frozen=True)
class Table:
    """Rows of text under their headers; the first cell of a row names it."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, in this order."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    verdict: bool = False
