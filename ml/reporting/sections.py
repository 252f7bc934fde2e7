"""The content of a report, independent of its format: sections of text, tables and plots."""

from __future__ import annotations

from dataclasses import dataclass

from ml.reporting.drawing import Plot


@dataclass(frozen=True)
class Table:
    """Rows of text below headers; the first cell of a row is its name."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, and what follows it: paragraphs, tables, then plots."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    verdict: bool = False
