"""A job's summary as a chart: a histogram of confidence for each class, one below the other.

Each class has its own scale, so that a rare one is visible, and every bar is labelled with its count. Drawn with Pillow
and its built-in font at double size, for high-density screens. The colours are Okabe and Ito's, which colour-blind
people can distinguish (https://jfly.uni-koeln.de/color/). Pillow's drawing modules are imported by the first chart.
"""

import io
import math
import unicodedata
from dataclasses import dataclass
from typing import Any

from jobs.results.queries import JobView
from jobs.results.summary import Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's without yellow, which is too pale on white."""
INK, FAINT, GRID, OTHERS = "#1a1a1a", "#595959", "#d9d9d9", "#8C8C8C"
SCALE = 2
WIDTH, LEFT, RIGHT, HEAD, LEGEND, PANEL, GAP, FOOT = 960, 84, 28, 106, 24, 140, 36, 58
"""Points, each of `SCALE` pixels."""
COLUMNS = 3
"""Columns of the legend."""
TICKS = 3
"""Maximum number of steps of a scale."""
UNPRINTABLE = "?"
SPELLED = "names in Latin letters"


@dataclass(frozen=True)
class Panel:
    """One class: number of scans in each bin."""

    label: str
    colour: str
    bins: list[int]


def draw_summary(view: JobView, found: Summary) -> bytes:
    """The chart as PNG."""
    panels = _panels(found.confidence.counts)
    top = HEAD + math.ceil(len(panels) / COLUMNS) * LEGEND
    height = top + len(panels) * (GAP + PANEL) + FOOT
    canvas = Canvas(WIDTH, height)
    _head(canvas, view, found)
    _legend(canvas, panels)
    for number, panel in enumerate(panels):
        _panel(canvas, panel, top + GAP + number * (GAP + PANEL))
    _confidence_axis(canvas, height - FOOT, found.confidence.edges)
    return canvas.png()


def _panels(counts: dict[str, list[int]]) -> list[Panel]:
    """A panel for each class; of many classes, the most frequent ones and one for all others."""
    labels = list(counts)
    if len(labels) > len(COLOURS):
        labels = sorted(labels, key=lambda label: -sum(counts[label]))[: len(COLOURS) - 1]
    panels = [Panel(label, colour, counts[label]) for label, colour in zip(labels, COLOURS, strict=False)]
    rest = [bins for label, bins in counts.items() if label not in labels]
    if rest:
        together = [sum(bins) for bins in zip(*rest, strict=True)]
        panels.append(Panel(f"{len(rest)} other classes", OTHERS, together))
    return panels


class Canvas:
    """A white image, drawn on in points."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, Any] = {}

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """A filled box."""
        corners = [round(value * SCALE) for value in (left, top, right, bottom)]
        self._draw.rectangle((*corners[:2], max(corners[2] - 1, corners[0]), max(corners[3] - 1, corners[1])), colour)

    def text(self, x: float, y: float, text: str, size: int, colour: str = INK, anchor: str = "ls") -> None:
        """Text at a point. `anchor` is Pillow's: `ls` is the left end of the baseline."""
        self._draw.text((x * SCALE, y * SCALE), text, colour, self._font(size), anchor)

    def width(self, text: str, size: int) -> float:
        """Width of the text."""
        return float(self._font(size).getlength(text)) / SCALE

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 2) -> None:
        """A line through the points."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(flat, colour, round(width * SCALE), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""
        self._draw.circle((x * SCALE, y * SCALE), radius * SCALE, colour)

    def vertical_text(self, x: float, y: float, text: str, size: int) -> None:
        """Vertical text, read upwards, centred at the point."""
        from PIL import Image, ImageDraw

        picture = Image.new("L", (round(self.width(text, size) * SCALE) + 2 * SCALE, 2 * size * SCALE))
        ImageDraw.Draw(picture).text((SCALE, size * SCALE), text, 255, self._font(size), "lm")
        turned = picture.rotate(90, expand=True)
        corner = round(x * SCALE) - turned.width // 2, round(y * SCALE) - turned.height // 2
        self._image.paste(FAINT, corner, turned)

    def png(self) -> bytes:
        """The image as PNG."""
        content = io.BytesIO()
        self._image.save(content, "PNG", dpi=(96 * SCALE, 96 * SCALE))
        return content.getvalue()

    def _font(self, size: int) -> Any:
        from PIL import ImageFont

        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * SCALE)
        return self._fonts[size]


def _head(canvas: Canvas, view: JobView, found: Summary) -> None:
    job = view.job
    name = job.name or ""
    title = printable(name)
    if not title or title.count(UNPRINTABLE) > name.count(UNPRINTABLE):
        title = f"Job {job.id}"
    canvas.text(LEFT, 38, truncate(canvas, title, 22, WIDTH - LEFT - RIGHT), 22)
    numbers = {**found.counts, "cached": found.cached}
    facts = [f"{number:,} {word}" for word, number in numbers.items() if number and word != "total"]
    version = [] if job.model_version is None else [f"model version {job.model_version}"]
    facts = [*version, f"{numbers['total']:,} scans", *facts, job.state.replace("_", " ")]
    if not all(_without_accents(label).isascii() for label in (name, *found.confidence.counts)):
        facts.append(SPELLED)
    canvas.text(LEFT, 62, " · ".join(facts), 14, FAINT)
    disposed = " · ".join(f"{number:,} {printable(word)}" for word, number in found.dispositions.items())
    canvas.text(LEFT, 82, truncate(canvas, disposed, 14, WIDTH - LEFT - RIGHT), 14, FAINT)


def _legend(canvas: Canvas, panels: list[Panel]) -> None:
    all_scans = sum(sum(panel.bins) for panel in panels)
    room = (WIDTH - LEFT - RIGHT) / COLUMNS
    for number, panel in enumerate(panels):
        x, y, scans = LEFT + number % COLUMNS * room, HEAD + number // COLUMNS * LEGEND, sum(panel.bins)
        canvas.box(x, y, x + 14, y + 14, panel.colour)
        share = f"  {scans:,} ({scans / all_scans:.1%})" if all_scans else ""
        label = truncate(canvas, printable(panel.label), 15, room - 40 - canvas.width(share, 15))
        canvas.text(x + 21, y + 12, label + share, 15)


def _panel(canvas: Canvas, panel: Panel, top: float) -> None:
    bottom = top + PANEL
    highest = _axis(canvas, max(panel.bins, default=0), top, bottom)
    wide = (WIDTH - LEFT - RIGHT) / len(panel.bins)
    for number, scans in enumerate(panel.bins):
        if scans:
            x = LEFT + number * wide
            edge = min(bottom - scans / highest * PANEL, bottom - 1.5)  # one scan among thousands stays visible
            canvas.box(x + 1.5, edge, x + wide - 1.5, bottom, panel.colour)
            canvas.text(x + wide / 2, edge - 3, f"{scans:,}", 11, anchor="ms")
    canvas.box(LEFT, bottom, WIDTH - RIGHT, bottom + 1, INK)
    canvas.text(LEFT, top - 8, truncate(canvas, printable(panel.label), 15, WIDTH - LEFT - RIGHT), 15)
    if not any(panel.bins):
        canvas.text((LEFT + WIDTH - RIGHT) / 2, top + PANEL / 2, "no scans so far", 14, FAINT, "mm")


def _axis(canvas: Canvas, most: int, top: float, bottom: float) -> float:
    """Draw the axis of scans; returns the value at its top."""
    step = _step(most)
    highest = max(most * 1.12, step)  # room for the number above the highest bar
    for scans in range(0, int(highest) + 1, step):
        y = bottom - scans / highest * (bottom - top)
        canvas.box(LEFT, y, WIDTH - RIGHT, y + 0.5, GRID)
        canvas.text(LEFT - 8, y, f"{scans:,}", 12, FAINT, "rm")
    canvas.vertical_text(18, (top + bottom) / 2, "scans", 12)
    return highest


def _step(most: int) -> int:
    """The smallest 1, 2 or 5 times a power of ten of which `TICKS` reach `most`."""
    power = 1
    while True:
        for leading in (1, 2, 5):
            if leading * power * TICKS >= most:
                return leading * power
        power *= 10


def _confidence_axis(canvas: Canvas, top: float, edges: tuple[float, ...]) -> None:
    wide = (WIDTH - LEFT - RIGHT) / (len(edges) - 1)
    for number, edge in enumerate(edges):
        x = LEFT + number * wide
        canvas.box(x - 0.5, top, x + 0.5, top + (6 if number % 2 == 0 else 3), INK)
        if number % 2 == 0:
            canvas.text(x, top + 9, f"{edge:.1f}", 12, FAINT, "mt")
    canvas.text((LEFT + WIDTH - RIGHT) / 2, top + 32, "confidence in the predicted class", 13, FAINT, "mt")


def printable(text: str) -> str:
    """The text in the characters of the built-in font: letters lose their accents, other scripts are spelled in Latin
    letters."""
    letters = _without_accents(text)
    if not letters.isascii():
        from anyascii import anyascii

        letters = anyascii(text)
    return "".join(mark if mark.isprintable() else UNPRINTABLE for mark in letters)


def _without_accents(text: str) -> str:
    return "".join(mark for mark in unicodedata.normalize("NFKD", text) if not unicodedata.combining(mark))


def truncate(canvas: Canvas, text: str, size: int, room: float) -> str:
    """The text, shortened to `room` with an ellipsis."""
    if canvas.width(text, size) <= room:
        return text
    while text and canvas.width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
