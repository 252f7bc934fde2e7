"""What every plot is made with: its size and caption, colours, and names as labels.

matplotlib is imported on first use, since that takes half a second. Colours are Okabe and Ito's, which are colour-blind
safe; lines also differ in style, for print.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ml.reporting.fonts import report_fonts, spelled

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black")
STYLES = ("-", "--", "-.", ":")
DPI = 130

Canvas = Any  # a matplotlib Figure or SubFigure


@dataclass(frozen=True)
class Plot:
    """One plot: `name` of its PNG file, title and caption, size in inches, and a function that draws it."""

    name: str
    title: str
    caption: str
    width: float
    height: float
    draw: Callable[[Canvas], None]

    @cached_property
    def png(self) -> bytes:
        """The content of the PNG file, drawn on first use. The same plot gives the same bytes."""
        # Figure without pyplot: no global state, no display, the Agg canvas.
        from matplotlib.figure import Figure

        with report_fonts():
            figure, sink = Figure(figsize=(self.width, self.height), layout="constrained"), io.BytesIO()
            self.draw(figure)
            figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
        return sink.getvalue()

    def save(self, folder: Path) -> Path:
        """Write the PNG into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        path.write_bytes(self.png)
        return path


def shown(name: str, longest: int = 22) -> str:
    """A class name as a label: short, on one line, in letters that the fonts have, with dollars escaped for
    matplotlib."""
    line = " ".join(spelled(name).split())
    short = line if len(line) <= longest else line[: longest - 1] + "…"
    return short.replace("$", r"\$")


def folded(name: str, columns: int, longest: int = 44) -> str:
    """A class name as a label of several short lines."""
    return "\n".join(textwrap.wrap(shown(name, longest), columns)) or " "


def legend_below(canvas: Canvas, letters: int = 52) -> None:
    """One legend of all panels below them, where it hides no curve; a label that several have comes once.

    `letters`: how many fit beside each other.
    """
    handles = {label: one for axes in canvas.axes for one, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = max(1, min(4, letters // (max(map(len, handles)) + 8)))
        canvas.legend(handles.values(), handles, loc="outside lower center", fontsize=8, ncols=columns, frameon=False)
