"""Renders a report as a PDF with A4 pages and vector plots, by matplotlib alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ml.reporting.drawing import Canvas, Plot
from ml.reporting.fonts import face, report_fonts, spelled
from ml.reporting.sections import Section, Table

A4 = (8.27, 11.69)  # inches
_MARGIN, _LINE = 0.7, 1.45  # inches; line height / font size
_BODY = 9.0  # points
_CELL, _CAPTION = 8.0, 7.0  # points
_GUTTER = 0.18  # inches between columns
_HEADING = 0.3  # inches


def write_pdf(title: str, head: Sequence[str], made_at: datetime, content: Sequence[Section], path: Path) -> None:
    """Write the sections as a PDF. `made_at` is its only date, so that the same content gives the same bytes.

    `head`: lines below the title.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    metadata = {"Title": title, "CreationDate": made_at, "ModDate": made_at, "Creator": "RenalQ"}
    with path.open("wb") as file, PdfPages(file, metadata=metadata) as pages, report_fonts():
        flow = _Flow(pages)
        flow.text(title, 16, bold=True)
        for line in head:
            flow.text(line, _BODY, colour="#555555")
        for section in content:
            flow.section(section)
        flow.finish()


@dataclass(frozen=True)
class _Float:
    """A row of plots, which finds its place where there is room; the first of a section brings its heading."""

    title: str
    row: Sequence[Plot]

    @property
    def height(self) -> float:
        return _row_height(self.row) + (_HEADING if self.title else 0.0)


class _Flow:
    """Lays out text, tables and plots on A4 pages from top to bottom.

    A page's texts are placed at once. Its plots are remembered with their tops, and drawn when the page is full. Plots
    that do not fit go to the top of the next page, and the text goes on before them.
    """

    def __init__(self, pages: Any) -> None:
        from matplotlib.textpath import TextToPath

        self._figure: Any = None
        self._pages, self._y, self._number = pages, 0.0, 0
        self._rows: list[tuple[float, Sequence[Plot]]] = []
        self._floats: list[_Float] = []
        self._measure = TextToPath()

    def section(self, section: Section) -> None:
        self.space(0.12)
        for number, row in enumerate(_rows_of(section.plots)):
            self._floats.append(_Float(section.title if number == 0 else "", row))
        self._place_floats()
        if not (section.paragraphs or section.tables):
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
        """End the last page, after pages for the plots that are left."""
        self._end_page()
        while self._floats:
            self._begin_page()
            self._end_page()

    def _end_page(self) -> None:
        if self._figure is None:
            return
        if self._rows:
            _draw_rows(self._figure, self._rows)
        self._number += 1
        self._figure.text(0.5, 0.35 / A4[1], str(self._number), fontsize=8, ha="center", color="#555555")
        self._pages.savefig(self._figure)
        self._figure, self._rows = None, []

    def _table(self, table: Table) -> None:
        widths = self._column_widths(table)
        self._need(0.8)
        if table.caption:
            self.text(table.caption, _CELL, colour="#555555")
        header = self._cells(table.headers, widths, bold=True)
        self._row(header, widths, bold=True)
        for row in table.rows:
            cells = self._cells(row, widths)
            if self._need(_lines_height(cells)):
                self._row(header, widths, bold=True)
            self._row(cells, widths)
        self.space(0.12)

    def _cells(self, row: Sequence[str], widths: Sequence[float], bold: bool = False) -> list[list[str]]:
        return [self._wrapped(cell, _CELL, width - _GUTTER, bold) for cell, width in zip(row, widths, strict=True)]

    def _column_widths(self, table: Table) -> list[float]:
        """As wide as the longest cells; if they need more than the page has, the widest columns give."""
        whole = A4[0] - 2 * _MARGIN
        columns = zip(table.headers, *table.rows, strict=True)
        widths = [
            max(self._inches(spelled(cell), _CELL, True) for cell in column) + _GUTTER + 0.01 for column in columns
        ]
        while sum(widths) > whole + 1e-9:
            widest = max(widths)
            second = max([width for width in widths if width < widest], default=0.0)
            number = widths.count(widest)
            give = min(widest - second, (sum(widths) - whole) / number)
            widths = [width - give if width == widest else width for width in widths]
        return widths

    def _row(self, lines: Sequence[Sequence[str]], widths: Sequence[float], bold: bool = False) -> None:
        left = _MARGIN
        for each, width in zip(lines, widths, strict=True):
            for number, line in enumerate(each):
                self._put(left, line, _CELL, bold, "black", below=number * _CELL * _LINE / 72)
            left += width
        self._y -= _lines_height(lines)

    def _place_floats(self, at_top: bool = False) -> None:
        """Place the plots that fit on this page; at its top at least one row."""
        for one in list(self._floats):
            if at_top or self._y - one.height >= _MARGIN:
                self._floats.remove(one)
                self._place(one)
                at_top = False

    def _place(self, one: _Float) -> None:
        if one.title:
            self._put(_MARGIN, one.title, 12, True, "black")
            self._y -= _HEADING
        self._rows.append((self._y, one.row))
        self._captions(one.row)
        self._y -= _row_height(one.row)

    def _need(self, inches: float) -> bool:
        """Begin new pages until one has so much room. Whether one was begun."""
        begun = False
        while self._figure is None or self._y < _MARGIN + inches:
            self._end_page()
            self._begin_page()
            begun = True
        return begun

    def _begin_page(self) -> None:
        from matplotlib.figure import Figure

        self._figure, self._y = Figure(figsize=A4), A4[1] - _MARGIN
        self._place_floats(at_top=True)

    def _captions(self, row: Sequence[Plot]) -> None:
        width = (A4[0] - 2 * _MARGIN) / len(row)
        for column, plot in enumerate(row):
            for number, line in enumerate(_caption(plot, len(row))):
                down = _plots_height(row) + number * _CAPTION * _LINE / 72
                self._put(_MARGIN + column * width, line, _CAPTION, False, "#444444", down)

    def _put(self, x: float, line: str, size: float, bold: bool, colour: str, below: float = 0.0) -> None:
        assert self._figure is not None
        place = x / A4[0], (self._y - below) / A4[1]
        style = {"fontsize": size, "color": colour, "va": "top", "parse_math": False, **face(line, bold)}
        self._figure.text(*place, line, **style)

    def _wrapped(self, text: str, size: float, width: float, bold: bool = False) -> list[str]:
        """Lines no wider than `width` inches; wider words, such as hashes, are cut."""
        lines = [""]
        for word in spelled(text).split():
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

        font = FontProperties(size=size, **face(text, bold))
        return float(self._measure.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def _lines_height(cells: Sequence[Sequence[str]]) -> float:
    return max(len(lines) for lines in cells) * _CELL * _LINE / 72


def _rows_of(plots: Sequence[Plot]) -> list[list[Plot]]:
    """Wide plots alone, narrow ones in pairs, also where a wide one comes between them."""
    rows: list[list[Plot]] = []
    for plot in plots:
        alone = next((row for row in rows if len(row) == 1 and row[0].width < 6), None)
        if plot.width < 6 and alone:
            alone.append(plot)
        else:
            rows.append([plot])
    return rows


def _row_height(row: Sequence[Plot]) -> float:
    """Inches, with the captions."""
    lines = max(len(_caption(plot, len(row))) for plot in row)
    return _plots_height(row) + lines * _CAPTION * _LINE / 72 + 0.25


def _plots_height(row: Sequence[Plot]) -> float:
    width = (A4[0] - 2 * _MARGIN) / len(row)
    return max(plot.height * min(1.0, width / plot.width) for plot in row)


def _draw_rows(figure: Canvas, rows: Sequence[tuple[float, Sequence[Plot]]]) -> None:
    """Draw rows of plots with their tops at these heights of the page (inches), and gaps for the texts between them."""
    heights, bottom = list[float](), A4[1]
    for top, row in rows:
        heights += [max(bottom - top, 1e-3), _plots_height(row)]
        bottom = top - heights[-1]
    figure.set_layout_engine("constrained", rect=(_MARGIN / A4[0], 0, 1 - 2 * _MARGIN / A4[0], 1))
    parts = figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights, bottom], squeeze=False)[:, 0]
    for part, (_, row) in zip(parts[1::2], rows, strict=True):
        for place, plot in zip(part.subfigures(1, len(row), squeeze=False)[0], row, strict=True):
            plot.draw(place)
    _settle(figure)


def _caption(plot: Plot, columns: int) -> list[str]:
    import textwrap

    return textwrap.wrap(spelled(f"{plot.title}. {plot.caption}"), 130 // columns - 6)


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
