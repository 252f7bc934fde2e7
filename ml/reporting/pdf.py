"""Renders a report as a PDF with A4 pages and vector plots, by matplotlib alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ml.reporting.plots import Canvas, Plot
from ml.reporting.sections import Section, Table

A4 = (8.27, 11.69)  # inches
_MARGIN, _LINE = 0.7, 1.45  # inches; line height / font size
_BODY = 9.0  # points
PLOTS_HEIGHT = 10.1  # inches per page for plots


def write_pdf(title: str, subtitle: str, made_at: datetime, content: Sequence[Section], path: Path) -> None:
    """Write the sections as a PDF. `made_at` is its only date, so that the same content gives the same bytes."""
    from matplotlib.backends.backend_pdf import PdfPages

    metadata = {"Title": title, "CreationDate": made_at, "ModDate": made_at, "Creator": "RenalQ"}
    with path.open("wb") as file, PdfPages(file, metadata=metadata) as pages:
        flow = _Flow(pages)
        flow.text(title, 16, bold=True)
        flow.text(subtitle, _BODY, colour="#555555")
        for section in content:
            flow.section(section)
        flow.finish()


class _Flow:
    """Lays out text and tables on A4 pages from top to bottom, and plots on pages of their own."""

    def __init__(self, pages: Any) -> None:
        from matplotlib.textpath import TextToPath

        self._pages, self._figure, self._y, self._number = pages, None, 0.0, 0
        self._measure = TextToPath()

    def section(self, section: Section) -> None:
        self.space(0.12)
        if section.plots:
            self._plots(section)
            return
        self._need(1.2)  # for the heading and some lines below it
        self.text(section.title, 12, bold=True)
        for paragraph in section.paragraphs:
            self.text(paragraph, _BODY)
            self.space(0.05)
        for table in section.tables:
            self._table(table)

    def text(self, text: str, size: float, bold: bool = False, colour: str = "black") -> None:
        for line in self._wrapped(text, size, A4[0] - 2 * _MARGIN, bold):
            self._need(size * _LINE / 72)
            self._put(_MARGIN, line, size, bold, colour)
            self._y -= size * _LINE / 72

    def space(self, inches: float) -> None:
        self._y -= inches

    def finish(self) -> None:
        if self._figure is not None:
            self._emit(self._figure)
            self._figure = None

    def _table(self, table: Table) -> None:
        widths = _column_widths(len(table.headers))
        self._need(0.6)
        if table.caption:
            self.text(table.caption, _BODY - 1, colour="#555555")
        self._row(table.headers, widths, bold=True)
        for row in table.rows:
            self._row(row, widths)
        self.space(0.12)

    def _row(self, cells: Sequence[str], widths: Sequence[float], bold: bool = False) -> None:
        size = _BODY - 1
        lines = [self._wrapped(cell, size, width - 0.1, bold) for cell, width in zip(cells, widths, strict=True)]
        height = max(len(each) for each in lines) * size * _LINE / 72
        self._need(height)
        left = _MARGIN
        for each, width in zip(lines, widths, strict=True):
            for number, line in enumerate(each):
                self._put(left, line, size, bold, "black", below=number * size * _LINE / 72)
            left += width
        self._y -= height

    def _plots(self, section: Section) -> None:
        self.finish()
        for number, page in enumerate(_pages_of(section.plots)):
            figure = self._page(layout="constrained")
            figure.get_layout_engine().set(rect=(0.06, 0.05, 0.88, 0.87))
            if number == 0:
                figure.text(_MARGIN / A4[0], 1 - 0.55 / A4[1], section.title, fontsize=12, weight="bold", va="top")
            _draw_page(figure, page)
            self._emit(figure)

    def _need(self, inches: float) -> None:
        if self._figure is None or self._y < _MARGIN + inches:
            self.finish()
            self._figure, self._y = self._page(), A4[1] - _MARGIN

    def _page(self, **options: Any) -> Any:
        from matplotlib.figure import Figure

        return Figure(figsize=A4, **options)

    def _emit(self, figure: Any) -> None:
        self._number += 1
        figure.text(0.5, 0.35 / A4[1], str(self._number), fontsize=8, ha="center", color="#555555")
        self._pages.savefig(figure)

    def _put(self, x: float, line: str, size: float, bold: bool, colour: str, below: float = 0.0) -> None:
        assert self._figure is not None
        style = {"fontsize": size, "weight": "bold" if bold else "normal", "color": colour, "va": "top"}
        self._figure.text(x / A4[0], (self._y - below) / A4[1], line, parse_math=False, **style)

    def _wrapped(self, text: str, size: float, width: float, bold: bool = False) -> list[str]:
        """Lines no wider than `width` inches; wider words, such as hashes, are cut."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self._inches(longer, size, bold) <= width:
                lines[-1] = longer
                continue
            lines += [word] if lines[-1] else []
            lines[-1] = word
            while self._inches(lines[-1], size, bold) > width:
                cut = max(1, int(len(lines[-1]) * width / self._inches(lines[-1], size, bold)) - 1)
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
        return lines

    def _inches(self, text: str, size: float, bold: bool) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight="bold" if bold else "normal")
        return float(self._measure.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def _column_widths(columns: int) -> list[float]:
    whole = A4[0] - 2 * _MARGIN
    first = whole * (0.42 if columns <= 4 else 0.2)
    return [first] + [(whole - first) / (columns - 1)] * (columns - 1)


def _pages_of(plots: Sequence[Plot]) -> list[list[list[Plot]]]:
    """Pages of rows: wide plots alone, narrow ones in pairs, as many rows as their heights allow."""
    rows: list[list[Plot]] = []
    for plot in plots:
        if rows and plot.width < 6 and len(rows[-1]) == 1 and rows[-1][0].width < 6:
            rows[-1].append(plot)
        else:
            rows.append([plot])
    pages: list[list[list[Plot]]] = [[]]
    for row in rows:
        if pages[-1] and sum(_row_height(one) for one in [*pages[-1], row]) > PLOTS_HEIGHT:
            pages.append([])
        pages[-1].append(row)
    return pages


def _row_height(row: Sequence[Plot]) -> float:
    room = (A4[0] - 1.0) / len(row)
    return max(plot.height * min(1.0, room / plot.width) for plot in row) + 0.4  # plus caption


def _draw_page(figure: Canvas, rows: Sequence[Sequence[Plot]]) -> None:
    heights = [_row_height(row) for row in rows]
    empty = max(PLOTS_HEIGHT - sum(heights), 0.01)
    parts = figure.subfigures(len(rows) + 1, 1, height_ratios=[*heights, empty], squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=False):
        for place, plot in zip(part.subfigures(1, len(row), squeeze=False)[0], row, strict=True):
            plot.draw(place)
            place.supxlabel(_folded(f"{plot.title}. {plot.caption}", 120 // len(row)), fontsize=7, color="#444444")
    _settle(figure)


def _settle(figure: Canvas) -> None:
    """Compute the layout now, and round positions: their last digits differ between runs, and so would the bytes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    parts = [figure]
    for part in parts:
        parts += part.subfigs
        for text in part.texts:
            text.set_position([round(float(place), 4) for place in text.get_position()])
        for axes in part.axes if part is figure else ():
            axes.set_position([round(float(place), 4) for place in axes.get_position().bounds])
        if part is not figure:
            part.bbox_relative.set_points(part.bbox_relative.get_points().round(4))


def _folded(text: str, columns: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, columns)).replace("$", r"\$")
