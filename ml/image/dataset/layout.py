"""What lies where in a dataset's folder: scans, their classes, the sides of a split, and what is passed over."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from ml.image.dataset.patients import is_kind, names_patient
from ml.image.dataset.sniffing import is_named_as_scan, is_scan
from ml.spec.junk_files import is_junk

_MAX_WRAPPERS = 2  # levels of folders that a zip may have around its class folders
_SIDE = re.compile(
    r"(?:[a-z0-9]+[-_ ])?(?:(?P<train>train|training)|(?P<validation>val|valid|validation|dev)|(?P<test>test|testing))"
    r"(?:[-_ ]?(?:set|data|images?|imgs?|split|folder|\d{1,2}))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """Where a scan lies. `name`: POSIX path relative to the dataset's folder; `below`: the same below its class folder.

    `label`: None if it lies in no class folder. `side`: train, validation or test, if a folder says so.
    """

    name: str
    label: str | None
    below: str
    side: str | None = None


@dataclass(frozen=True)
class Layout:
    """All files of a dataset's folder, each of them in one field."""

    folder: Path
    places: tuple[Place, ...] = ()
    """Scans in the order of their labels and names; those without a label are in no class."""
    others: tuple[str, ...] = ()
    """Files that are no scans."""
    junk: tuple[str, ...] = ()
    """Files that are passed over by their names (`ml.spec.junk_files`)."""
    side_folders: tuple[str, ...] = ()
    """Names of folders such as train and test around the class folders."""

    @cached_property
    def scans(self) -> tuple[Place, ...]:
        """The scans that have a label."""
        return tuple(place for place in self.places if place.label is not None)

    @cached_property
    def strays(self) -> tuple[str, ...]:
        """Pictures that lie in no class."""
        return tuple(place.name for place in self.places if place.label is None)

    @property
    def labels(self) -> set[str]:
        """Labels as they are written."""
        return {place.label for place in self.places if place.label is not None}

    def problems(self) -> Iterator[str]:
        """Sentences about folders that cannot be classes."""
        yield from _spelling_problems(self.labels)
        names = sorted(self.labels)
        if names and (all(names_patient(name) for name in names) or self._are_patients_of_classes()):
            yield (
                f"The folders {', '.join(names[:3])}{' and others' * (len(names) > 3)} are named as patients, not as "
                "classes: put one folder for each class at the top, and the patients' folders into these."
            )
        if self.side_folders and not names:
            yield (
                f"The folders {' and '.join(self.side_folders)} are sides of a split, not classes: put one folder for "
                "each class into each of them."
            )

    def _are_patients_of_classes(self) -> bool:
        """Whether labels have numbers, and each folder below lies in several of them: `P01/Normal`, `P02/Normal`."""
        below: dict[str, set[str]] = {label: set() for label in self.labels}
        for place in self.scans:
            first, slash, _ = place.below.partition("/")
            if not slash or not re.search(r"\d", place.label or "") or is_kind(first):
                return False
            below[place.label or ""].add(first)
        counts = Counter(name for names in below.values() for name in names)
        return len(below) > 2 and bool(counts) and min(counts.values()) > 1

    def passed_over_pictures(self) -> Iterator[str]:
        """Names of what is passed over and is a picture."""
        yield from self.strays
        yield from (name for name in self.junk if is_scan(self.folder / name))

    def relabelled(self, labels: dict[str, str]) -> Layout:
        """With these labels, by names of scans, instead of those of the folders."""
        places = (replace(place, label=labels.get(place.name, place.label)) for place in self.places)
        return replace(self, places=_ordered(places))


def side_of(name: str) -> str | None:
    """The side of a split that a name stands for: train, validation or test; None for any other name."""
    match = _SIDE.fullmatch(name.strip())
    return match.lastgroup if match else None


def read_layout(folder: Path) -> Layout:
    """Look at all files of a folder. Wrapper folders around the classes, up to two levels, are skipped."""
    scans: list[str] = []
    others: list[str] = []
    junk: list[str] = []
    for name in _files(folder):
        kind = junk if is_junk(name) else scans if is_scan(folder / name) or is_named_as_scan(name) else others
        kind.append(name)
    places, side_folders = _placed(_Tree(scans))
    return Layout(folder, _ordered(places), tuple(others), tuple(junk), side_folders)


def _files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        above = Path(root).relative_to(folder)
        yield from ((above / file).as_posix() for file in sorted(files) if (Path(root) / file).is_file())


def _ordered(places: Iterable[Place]) -> tuple[Place, ...]:
    return tuple(sorted(places, key=lambda place: (place.label or "", PurePosixPath(place.name).parts)))


class _Tree:
    """Folders by what is in them: `below` has their subfolders with scans, `scans` all scans at any depth."""

    def __init__(self, scans: list[str]) -> None:
        self.below: dict[str, set[str]] = {"": set()}
        self.scans: dict[str, list[str]] = {"": []}
        for scan in scans:
            *above, _ = scan.split("/")
            for depth in range(len(above) + 1):
                self.scans.setdefault("/".join(above[:depth]), []).append(scan)
                if depth:
                    self.below.setdefault("/".join(above[: depth - 1]), set()).add("/".join(above[:depth]))

    def has_own_scans(self, folder: str) -> bool:
        return any(scan.rpartition("/")[0] == folder for scan in self.scans[folder])

    def folders(self, folder: str) -> list[str]:
        """The subfolders that hold scans, sorted."""
        return sorted(self.below.get(folder, ()))

    def inside_wrappers(self, folder: str) -> str:
        """The folder with the class folders: below folders that hold nothing but one other folder."""
        for _ in range(_MAX_WRAPPERS):
            below = self.folders(folder)
            if len(below) != 1 or self.has_own_scans(folder) or self.has_own_scans(below[0]):
                break
            if all(names_patient(_name(inner)) for inner in self.folders(below[0])):
                break  # one class, with a folder for each patient
            folder = below[0]
        return folder


def _name(folder: str) -> str:
    return folder.rpartition("/")[2]


def _placed(tree: _Tree) -> tuple[list[Place], tuple[str, ...]]:
    """The places of all scans, and the names of the folders that are sides of a split."""
    root = tree.inside_wrappers("")
    sides = {folder: side for folder in tree.folders(root) if (side := side_of(_name(folder)))}
    if len(sides) == 1 and not _repeats_classes(tree, root, next(iter(sides))):
        sides = {}
    classes: dict[str, str | None] = {}
    if len(sides) < 2:
        classes |= {folder: None for folder in tree.folders(root) if folder not in sides}
    for folder, side in sides.items():
        classes |= dict.fromkeys(tree.folders(tree.inside_wrappers(folder)), side)
    places = [_place(scan, folder, side) for folder, side in classes.items() for scan in tree.scans[folder]]
    placed = {place.name for place in places}
    strays = [Place(scan, None, scan) for scan in tree.scans[""] if scan not in placed]
    return places + strays, tuple(sorted(map(_name, sides)))


def _repeats_classes(tree: _Tree, root: str, side: str) -> bool:
    """Whether the only folder with the name of a side holds folders with the names of those beside it."""
    beside = {_name(folder) for folder in tree.folders(root)}
    return any(_name(inner) in beside for inner in tree.folders(tree.inside_wrappers(side)))


def _place(scan: str, folder: str, side: str | None) -> Place:
    first, slash, rest = scan[len(folder) + 1 :].partition("/")
    own = side_of(first) if slash else None
    return Place(scan, _name(folder), rest if own else first + slash + rest, side or own)


def _spelling_problems(labels: Iterable[str]) -> Iterator[str]:
    """Sentences for labels that are one in two spellings."""
    spellings: dict[str, list[str]] = {}
    for label in sorted(labels):
        spellings.setdefault(_folded(label), []).append(label)
    for names in spellings.values():
        if len(names) > 1:
            shown = " and ".join(name if name.isascii() else f"{name} ({name!a})" for name in names)
            yield (
                f"The classes {shown} differ by case, spaces or Unicode form alone: if they are one, give them one "
                "name, else names that differ by more."
            )


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
