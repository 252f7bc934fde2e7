"""`make picture`: docs/architecture.svg and the tables of rooms in docs/architecture.md, made from the code.

The picture comes from the import graph (grimp) and the floors from import-linter's `layers` contracts in
pyproject.toml; the tables come from the docstrings of the rooms. `test_picture.py` fails where either is out of date.
"""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from textwrap import fill

import grimp

ROOT = Path(__file__).resolve().parents[2]
SVG = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
ROWS = (("migrations", "cli", "api", "worker"), ("jobs", "ml"))
"""Where each package stands, row by row. A room that holds at least `EXPANDED` rooms gets a box of its own below."""
EXPANDED = 3
TABLES = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)

WIDTH, MARGIN, GAP, PAD = 1000.0, 24.0, 54.0, 10.0
HEADER, ROOM, FLOOR_GAP, ROW_GAP = 30.0, 26.0, 20.0, 84.0
STYLE = """
    .house{fill:#fff;stroke:#33658a;stroke-width:1.5} .floor{fill:#eef4f9} .room{fill:#fff;stroke:#6b8fae}
    .file{fill:#f7f9fb;stroke:#c4d2de;stroke-dasharray:3 2} .t{font-weight:600;font-size:15px;fill:#1b2a38}
    .r{font-size:12px;fill:#1b2a38} .l{font-size:12px;fill:#33658a;paint-order:stroke;stroke:#fbfcfd;stroke-width:4}
    .in{stroke:#9db4c7;stroke-width:1.1;fill:none;marker-end:url(#s)}
    .out{stroke:#33658a;stroke-width:2;fill:none;marker-end:url(#h)}"""

Edges = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class House:
    """A package, or a room with rooms of its own: its floors from top to bottom, and who imports whom inside."""

    name: str
    floors: Sequence[Sequence[str]]
    edges: Edges


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@cache
def graph() -> grimp.ImportGraph:
    """The imports of all packages; those under `if TYPE_CHECKING` count as well."""
    return grimp.build_graph(*(name for row in ROWS for name in row), cache_dir=None)


@cache
def contracts() -> dict[str, list[list[str]]]:
    """The floors that import-linter holds, by the package or room that they divide."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found: dict[str, list[list[str]]] = {}
    for contract in settings["contracts"]:
        if contract["type"] == "layers":
            floors = [[room.strip(" ()") for room in re.split("[|:]", floor)] for floor in contract["layers"]]
            for container in contract.get("containers", [None]):
                named = [[f"{container}.{room}" if container else room for room in floor] for floor in floors]
                found[container or named[0][0].rpartition(".")[0]] = named
    return found


def houses() -> dict[str, House]:
    """Every box of the picture, by name."""
    names = [name for row in ROWS for name in row]
    rooms = [room for name in names for room in sorted(graph().find_children(name)) if _is_expanded(room)]
    return {name: _house(name) for name in [*names, *rooms]}


def _is_expanded(room: str) -> bool:
    return sum(1 for inner in graph().find_children(room) if graph().find_children(inner)) >= EXPANDED


def _house(name: str) -> House:
    rooms = sorted(graph().find_children(name))
    edges = {room: frozenset(_imported(room, rooms)) for room in rooms}
    floor_of = levels(rooms, edges, contracts().get(name, []))
    by_level = defaultdict(list)
    for room in rooms:
        by_level[floor_of[room]].append(room)
    return House(name, [by_level[level] for level in sorted(by_level, reverse=True)], edges)


def _imported(room: str, rooms: Iterable[str]) -> Iterable[str]:
    return (other for other in rooms if other != room and imports(room, other))


def imports(importer: str, imported: str) -> list[str]:
    """The modules below `imported` that modules below `importer` import directly."""
    sources = [importer, *sorted(graph().find_descendants(importer))]
    found = {target for source in sources for target in graph().find_modules_directly_imported_by(source)}
    return sorted(target for target in found if target == imported or target.startswith(f"{imported}."))


def levels(rooms: Sequence[str], edges: Edges, floors: Sequence[Sequence[str]]) -> dict[str, int]:
    """The floor of each room, from the lowest (0). Rooms that no contract names stand just above what they import."""
    levels = {room: len(floors) - 1 - number for number, floor in enumerate(floors) for room in floor}

    def level(room: str, above: tuple[str, ...] = ()) -> int:
        if room not in levels:
            below = [level(other, (*above, room)) for other in edges[room] if other not in (*above, room)]
            levels[room] = 1 + max(below, default=-1)
        return levels[room]

    return {room: level(room) for room in rooms}


def reduced(edges: Edges) -> list[tuple[str, str]]:
    """The arrows without those that follow from others: a → c is left out where a → b → c."""

    def reach(room: str, seen: set[str]) -> set[str]:
        for other in edges[room] - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    reached = {room: reach(room, set()) for room in edges}
    return [
        (room, target)
        for room in sorted(edges)
        for target in sorted(edges[room])
        if not any(target in reached[other] for other in edges[room] - {target})
    ]


class Drawing:
    """The SVG as it grows. Boxes are known by the package's or room's full name."""

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        self._back: list[str] = []
        self._front: list[str] = []
        self._labels: list[str] = []

    def house(self, house: House, x: float, y: float, width: float) -> None:
        """A box with its floors, drawn from `y` downwards."""
        top = y + HEADER
        self._front.append(_text("t", x + PAD, y + 20, house.name, "start"))
        for floor in house.floors:
            height = self._floor(floor, x + PAD, top, width - 2 * PAD)
            self._back.append(f'<rect class="floor"{_place(Box(x + PAD, top, width - 2 * PAD, height))} rx="5"/>')
            top += height + FLOOR_GAP
        box = Box(x, y, width, top - FLOOR_GAP + PAD - y)
        self.boxes[house.name] = box
        self._back.insert(0, f'<rect class="house"{_place(box)} rx="9"/>')
        self._back += [self._arrow("in", self.boxes[a], self.boxes[b]) for a, b in reduced(house.edges)]

    def _floor(self, rooms: Sequence[str], x: float, y: float, width: float) -> float:
        """Rooms beside each other, in as many lines as they need; the floor's height."""
        lines: list[list[tuple[str, float]]] = [[]]
        for room in sorted(rooms, key=lambda name: (not graph().find_children(name), name)):
            size = 22 + 6.9 * len(room.rpartition(".")[2])
            if lines[-1] and sum(own + PAD for _, own in lines[-1]) + size + PAD > width:
                lines.append([])
            lines[-1].append((room, size))
        for number, line in enumerate(lines):
            left = x + (width - sum(size + PAD for _, size in line) + PAD) / 2
            for room, size in line:
                self._room(room, Box(left, y + 7 + number * (ROOM + 7), size, ROOM))
                left += size + PAD
        return 7 + len(lines) * (ROOM + 7)

    def _room(self, name: str, box: Box) -> None:
        kind = "room" if graph().find_children(name) else "file"
        self.boxes[name] = box
        self._front.append(f'<rect class="{kind}"{_place(box)} rx="{5 if kind == "room" else 2}"/>')
        self._front.append(_text("r", box.middle, box.y + 17, name.rpartition(".")[2]))

    def _arrow(self, kind: str, start: Box, end: Box) -> str:
        if end.y > start.y:
            y1, y2 = start.bottom, end.y
        else:  # against the floors, or beside: only where no contract holds
            y1, y2 = start.y, end.bottom
        return f'<path class="{kind}" d="M{start.middle:.1f} {y1:.1f}L{end.middle:.1f} {y2:.1f}"/>'

    def between(self, importer: str, imported: str, number: int, of: int) -> None:
        """The arrow from one package to another, with what it imports."""
        targets = imports(importer, imported)
        if not targets:
            return
        start, end = self.boxes[importer], self.boxes[imported]
        rooms = sorted({".".join(target.split(".")[:2]) for target in targets})
        label = rooms[0] if len(rooms) == 1 else f"{len(targets)} modules"
        if abs(start.y - end.y) < 1:  # side by side
            left, right = (start.x + start.width, end.x) if start.x < end.x else (start.x, end.x + end.width)
            self._front.append(f'<path class="out" d="M{left:.1f} {start.y + 15:.1f}H{right:.1f}"/>')
            self._labels.append(_text("l", (left + right) / 2, start.y + 8, label))
            return
        x1 = start.x + start.width * (number + 1) / (of + 1)
        x2 = end.x + end.width * min(max((x1 - 40) / (WIDTH - 80), 0.08), 0.92)
        self._front.append(f'<path class="out" d="M{x1:.1f} {start.bottom:.1f}L{x2:.1f} {end.y:.1f}"/>')
        at = 1 - 22 / (end.y - start.bottom)
        self._labels.append(_text("l", x1 + (x2 - x1) * at, end.y - 18, label))

    def text(self, height: float) -> str:
        """The whole file."""
        marks = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="{size}" markerHeight="{size}" '
            f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
            for name, size, colour in (("h", 6, "#33658a"), ("s", 6, "#9db4c7"))
        )
        note = (
            "Made by `make picture` from the import graph. Imports go down: from floor to floor, and along the arrows."
        )
        body = "\n  ".join([*self._back, *self._front, *self._labels, _text("l", WIDTH / 2, height - 12, note)])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" '
            f'font-family="system-ui, sans-serif">\n  <style>{STYLE}\n  </style>\n  <defs>{marks}</defs>\n'
            f'  <rect width="{WIDTH:.0f}" height="{height:.0f}" fill="#fbfcfd"/>\n  {body}\n</svg>\n'
        )


def _place(box: Box) -> str:
    return f' x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'


def _text(kind: str, x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def svg() -> str:
    """docs/architecture.svg."""
    every, drawing, y = houses(), Drawing(), MARGIN
    names, inner = [name for row in ROWS for name in row], [name for name in every if "." in name]
    for row in ROWS:
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        for number, name in enumerate(row):
            drawing.house(every[name], MARGIN + number * (width + GAP), y, width)
        y = max(drawing.boxes[name].bottom for name in row) + ROW_GAP
    for name in inner:  # below the package that it stands in
        package = drawing.boxes[name.partition(".")[0]]
        below = max(box.bottom for known, box in drawing.boxes.items() if known in every and box.x == package.x)
        drawing.house(every[name], package.x, below + GAP / 2, package.width)
    for name in names:
        others = [other for other in names if other != name and imports(name, other)]
        for number, other in enumerate(others):
            drawing.between(name, other, number, len(others))
    return drawing.text(max(box.bottom for box in drawing.boxes.values()) + 36)


def tables() -> str:
    """The tables of rooms in docs/architecture.md: one for each package and each room that holds several rooms."""
    return "\n".join(_table(house) for house in houses().values())


def _table(house: House) -> str:
    rooms = [room for floor in house.floors for room in floor]
    rows = [f"| [`{room.rpartition('.')[2]}`](../{_path(room)}) | {sentence(room)} |" for room in rooms]
    title = f"### `{house.name}/`\n\n{fill(sentence(house.name), 100)}\n"
    return "\n".join([title, "| room or file | what lives there |", "| --- | --- |", *rows, ""])


def _path(module: str) -> str:
    path = module.replace(".", "/")
    return path if (ROOT / path).is_dir() else f"{path}.py"


def sentence(module: str) -> str:
    """The first sentence of the module's docstring."""
    path = ROOT / _path(module)
    source = (path / "__init__.py" if path.is_dir() else path).read_text()
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", " ".join(first.split()))[0]


def main() -> None:
    """Write both files anew."""
    SVG.write_text(svg())
    PAGE.write_text(TABLES.sub(lambda _: tables(), PAGE.read_text()))


if __name__ == "__main__":
    main()
