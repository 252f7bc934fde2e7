"""Drift as a chart: the index of each figure day by day with the bound, and below it accuracy and rejected scans.

A figure above its limit (the bound and what chance may add) has a large dot. Of many figures, those with the highest
indices are shown.
"""

import datetime as dt
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.views.charts import COLOURS, FAINT, GRID, INK, LEFT, RIGHT, WIDTH, Canvas, printable, truncate
from jobs.models.drift import Day, DriftReport

HEAD, LEGEND, PANEL, GAP, FOOT = 84, 26, 220, 58, 44
"""In points, as in `api.views.charts`."""
TICKS = 5
"""Maximum number of steps of a scale."""
DATES = 8
"""Maximum number of dates below a panel."""
DASH = 8.0
"""Length of a dash, and of the gap after it."""


@dataclass(frozen=True)
class Line:
    """One figure over the days; days in `marked` have a large dot."""

    label: str
    colour: str
    values: dict[dt.date, float]
    marked: frozenset[dt.date] = frozenset()


@dataclass(frozen=True)
class Frame:
    """Coordinates of a panel: days from left to right, values from 0 at `bottom` to `highest` at `top`."""

    first: dt.date
    days: int
    top: float
    highest: float

    @property
    def bottom(self) -> float:
        """Y coordinate of value 0."""
        return self.top + PANEL

    def x(self, day: dt.date) -> float:
        """X coordinate of the middle of a day."""
        return LEFT + ((day - self.first).days + 0.5) * (WIDTH - LEFT - RIGHT) / self.days

    def y(self, value: float) -> float:
        """Y coordinate of a value."""
        return self.bottom - min(value, self.highest) / self.highest * PANEL


def draw_drift(found: DriftReport, days: int) -> bytes:
    """The chart of `days` up to the latest, as PNG."""
    canvas = Canvas(WIDTH, HEAD + 2 * (LEGEND + PANEL + GAP) + FOOT - GAP)
    last = found.days[-1].day if found.days else dt.datetime.now(dt.UTC).date()
    first = last - dt.timedelta(days=days - 1)
    _head(canvas, found)
    indices = _indices(found.days)
    highest = max([value for line in indices for value in line.values.values()] + [2 * found.bound]) * 1.05
    upper = Frame(first, days, HEAD + LEGEND, highest)
    _panel(canvas, upper, indices, "population stability index")
    _bound_line(canvas, upper, found.bound)
    lower = Frame(first, days, HEAD + LEGEND + PANEL + GAP + LEGEND, 1.0)
    _panel(canvas, lower, _shares(found.days), "share")
    return canvas.png()


def _head(canvas: Canvas, found: DriftReport) -> None:
    canvas.text(LEFT, 38, f"Version {found.model.version}: its predictions against its test scans", 22)
    scans = sum(day.scans for day in found.days)
    facts = [f"{scans:,} predictions", f"{found.truths.known:,} with a known truth"]
    facts.append("no reference" if found.reference_scans is None else f"{found.reference_scans:,} test scans")
    latest = found.latest
    if latest and latest.drifted:
        facts.append(f"drifted on {latest.day}: {', '.join(map(printable, latest.drifted))}")
    elif latest and latest.figures:
        facts.append("no drift")
    canvas.text(LEFT, 62, truncate(canvas, " · ".join(facts), 14, WIDTH - LEFT - RIGHT), 14, FAINT)


def _indices(days: Sequence[Day]) -> list[Line]:
    peaks: dict[str, float] = {}
    for day in days:
        for name, figure in day.figures.items():
            peaks[name] = max(figure.psi, peaks.get(name, 0.0))
    by_peak = sorted(peaks, key=lambda name: (-peaks[name], name))
    return [
        Line(
            name,
            colour,
            {day.day: day.figures[name].psi for day in days if name in day.figures},
            frozenset(day.day for day in days if name in day.drifted),
        )
        for name, colour in zip(by_peak, COLOURS, strict=False)
    ]


def _shares(days: Sequence[Day]) -> list[Line]:
    def line(label: str, colour: str, read: Callable[[Day], float | None]) -> Line:
        values = {day.day: read(day) for day in days}
        return Line(label, colour, {day: value for day, value in values.items() if value is not None})

    return [
        line("accuracy where the truth is known", COLOURS[0], lambda day: day.truths.accuracy),
        line("rejected scans", COLOURS[1], lambda day: day.rejected_share),
    ]


def _panel(canvas: Canvas, frame: Frame, lines: Sequence[Line], axis: str) -> None:
    _legend(canvas, lines, frame.top - LEGEND)
    _values(canvas, frame, axis)
    _dates(canvas, frame)
    for line in lines:
        points = [(frame.x(day), frame.y(value)) for day, value in sorted(line.values.items())]
        canvas.line(points, line.colour)
        for day, value in line.values.items():
            canvas.dot(frame.x(day), frame.y(value), 5.5 if day in line.marked else 2.5, line.colour)
    if not any(line.values for line in lines):
        canvas.text((LEFT + WIDTH - RIGHT) / 2, frame.top + PANEL / 2, "nothing to show so far", 14, FAINT, "mm")


def _legend(canvas: Canvas, lines: Sequence[Line], top: float) -> None:
    room = (WIDTH - LEFT - RIGHT) / max(len(lines), 1)
    for number, line in enumerate(lines):
        x = LEFT + number * room
        canvas.box(x, top, x + 14, top + 14, line.colour)
        canvas.text(x + 20, top + 12, truncate(canvas, printable(line.label), 13, room - 28), 13)


def _values(canvas: Canvas, frame: Frame, axis: str) -> None:
    step = _step(frame.highest)
    for number in range(int(frame.highest / step + 1e-9) + 1):
        y = frame.y(number * step)
        canvas.box(LEFT, y, WIDTH - RIGHT, y + 0.5, GRID)
        canvas.text(LEFT - 8, y, f"{number * step:g}", 12, FAINT, "rm")
    canvas.box(LEFT, frame.bottom, WIDTH - RIGHT, frame.bottom + 1, INK)
    canvas.vertical_text(18, (frame.top + frame.bottom) / 2, axis, 12)


def _step(most: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten of which `TICKS` reach `most`."""
    power: float = 10.0 ** (math.floor(math.log10(most)) - 1)
    return next(power * leading for leading in (1, 2, 5, 10, 20, 50, 100) if power * leading * TICKS >= most)


def _dates(canvas: Canvas, frame: Frame) -> None:
    every = math.ceil(frame.days / DATES)
    for number in range(frame.days - 1, -1, -every):
        day = frame.first + dt.timedelta(days=number)
        canvas.box(frame.x(day) - 0.5, frame.bottom, frame.x(day) + 0.5, frame.bottom + 5, INK)
        canvas.text(frame.x(day), frame.bottom + 9, f"{day:%Y-%m-%d}", 12, FAINT, "mt")


def _bound_line(canvas: Canvas, frame: Frame, bound: float) -> None:
    y, x = frame.y(bound), float(LEFT)
    while x < WIDTH - RIGHT:
        canvas.line([(x, y), (min(x + DASH, WIDTH - RIGHT), y)], INK, 1)
        x += 2 * DASH
    canvas.text(WIDTH - RIGHT, y - 4, f"bound {bound:g}", 12, INK, "rs")
