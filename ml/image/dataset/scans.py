"""A folder of scans, one folder a class: found, decoded once, checked and counted; and the manifest that keeps it."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml.image.dataset.inspection import Inspection, conflicts, inspect_scans, warnings
from ml.image.dataset.patients import patient_of
from ml.image.dataset.perceptual_hash import describe
from ml.image.dataset.scan import ScanFile
from ml.image.pixels.decoding import SUFFIXES, colour_mode, decode, is_dicom
from ml.runtime.errors import BadDataset, ImageError
from ml.runtime.prefetch import ahead

MIN_PER_CLASS = 5  # fewer cannot be split 80/20 with a scan of each class on both sides
NAMED_FILES = 20  # broken files named in the problems; the rest is counted
_WRAPPERS = 2  # folders around the class folders that a zip may have
_MODALITY = re.compile(r"[A-Z]{2,16}")

Sink = Callable[[int, np.ndarray], None]
Report = Callable[[float], None]


@dataclass(frozen=True)
class DatasetReport:
    """What a folder holds: scans a class, their number, a digest of contents and labels, and what is wrong.

    `problems` forbid training; `warnings` say what spoils it or its scores, and what to do about it.
    """

    classes: dict[str, int]
    images: int
    digest: str
    problems: tuple[str, ...]
    scans: tuple[ScanFile, ...] = ()
    warnings: tuple[str, ...] = ()
    inspection: Inspection = field(default_factory=Inspection)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the network's outputs."""
        return tuple(self.classes)

    @property
    def labels(self) -> np.ndarray:
        """Each scan's class as an index: int64 [images]."""
        index = {name: number for number, name in enumerate(self.names)}
        return np.array([index[scan.label] for scan in self.scans], dtype=np.int64)

    def digest_of(self, scans: Iterable[int]) -> str:
        """Which scans these are: two networks' scores on scans of the same digest are comparable."""
        chosen = sorted(f"{self.scans[scan].label}\0{self.scans[scan].sha256}" for scan in scans)
        return hashlib.sha256("\n".join(chosen).encode()).hexdigest()

    def raise_for_problems(self) -> None:
        """BadDataset with all reasons when there is one."""
        if self.problems:
            raise BadDataset(" ".join(self.problems))


# --- finding ---------------------------------------------------------------------------------------------------------


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name → its image files (also those in folders below), sorted; looks through up to two wrapper folders."""
    return {sub.name: sorted(path for path in sub.rglob("*") if _is_image(path)) for sub in _class_folders(folder)}


def _class_folders(folder: Path) -> list[Path]:
    root = folder
    for _ in range(_WRAPPERS):
        below = _subfolders(root)
        if len(below) != 1 or _images_in(root) or _images_in(below[0]) or not _subfolders(below[0]):
            break
        root = below[0]
    return _subfolders(root)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith((".", "__MACOSX")))


def _images_in(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())


def _is_image(path: Path) -> bool:
    # DICOM files often have no suffix at all; readme.txt and labels.csv are nobody's scan.
    return path.is_file() and not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or not path.suffix)


def _left_over(folder: Path, found: dict[str, list[Path]]) -> tuple[int, int]:
    """How many files belong to no class: those that are no images, and images outside of the class folders."""
    taken = {path for paths in found.values() for path in paths}
    hidden = (".", "__MACOSX")
    rest = [
        path
        for path in folder.rglob("*")
        if path not in taken
        and path.is_file()
        and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    ]
    stray = sum(path.suffix.lower() in SUFFIXES for path in rest)
    return len(rest) - stray, stray


# --- checking --------------------------------------------------------------------------------------------------------


def check_dataset(
    folder: Path,
    classes: int | None = None,
    sink: Sink | None = None,
    report: Report | None = None,
    window: tuple[float, float] | None = None,
) -> DatasetReport:
    """Decode every scan once and say what is wrong, naming files relative to `folder`.

    `classes`: how many class folders there must be. `sink` gets each scan's index and pixels (uint8 [h, w, 3]) in the
    order of `scans`, so that whoever needs the pixels need not decode again. `report` hears the fraction done.
    `window`: centre and width of the CT window in Hounsfield units, None for each file's own.
    """
    found = find_classes(folder)
    counts = {name: len(paths) for name, paths in found.items()}
    scans, broken = [], []
    for index, (scan, problem, pixels) in enumerate(_examined(folder, found, window)):
        scans.append(scan)
        if problem or pixels is None:
            broken.append(f"{scan.path}: {problem}")
        elif sink:
            sink(index, pixels)
        if report:
            report((index + 1) / sum(counts.values()))
    problems = (*_shape_problems(counts, classes), *_broken_problems(broken), *conflicts(scans))
    inspection = inspect_scans(scans, counts, *_left_over(folder, found))
    noted = warnings(inspection, counts)
    return DatasetReport(counts, len(scans), _digest(scans), problems, tuple(scans), noted, inspection)


def count_images(folder: Path) -> int:
    """How many scans `check_dataset` will look at."""
    return sum(len(paths) for paths in find_classes(folder).values())


Examined = tuple[ScanFile, str | None, np.ndarray | None]


def _examined(folder: Path, found: dict[str, list[Path]], window: tuple[float, float] | None) -> Iterator[Examined]:
    # A patient's name is looked for below the class folder: what stands above it would be every scan's patient.
    roots = {root.name: root for root in _class_folders(folder)}
    work = [(path, label) for label, paths in found.items() for path in paths]
    return ahead(lambda item: _examine(folder, roots[item[1]], window, item), work)


def _examine(folder: Path, root: Path, window: tuple[float, float] | None, item: tuple[Path, str]) -> Examined:
    path, label = item
    name = path.relative_to(folder).as_posix()
    try:
        content = path.read_bytes()
    except OSError:
        return ScanFile(name, label, "", None), "the file cannot be opened.", None
    identity, modality = _dicom_header(content)
    patient = patient_of(path.relative_to(root).as_posix(), identity)
    scan = ScanFile(name, label, hashlib.sha256(content).hexdigest(), patient, modality=modality)
    try:
        pixels, mode = decode(content, window), colour_mode(content)
    except ImageError as error:
        return scan, str(error), None
    height, width = pixels.shape[:2]
    return replace(scan, likeness=describe(pixels), height=height, width=width, mode=mode), None, pixels


def _dicom_header(content: bytes) -> tuple[str | None, str | None]:
    """(PatientID, modality), None where it is not told."""
    if not is_dicom(content):
        return None, None
    import pydicom

    try:
        tags = ["PatientID", "Modality"]
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=tags)
        identity, modality = str(header.get("PatientID") or ""), str(header.get("Modality") or "")
    except Exception:  # a damaged header: decoding names the file as broken
        return None, None
    # Whoever wrote something else into the tag may have written a name.
    return identity or None, modality if _MODALITY.fullmatch(modality) else "other"


def _shape_problems(counts: dict[str, int], classes: int | None) -> Iterator[str]:
    if sum(counts.values()) == 0:
        yield "The dataset holds no images: one folder for each class is expected, with its scans in it."
        return
    if len(counts) == 1:
        yield f"The dataset has one class only ({next(iter(counts))}): at least two class folders are needed."
    elif classes is not None and len(counts) != classes:
        yield f"The dataset has {len(counts)} class folders ({', '.join(counts)}), but classes is {classes}."
    for name, count in counts.items():
        if count < MIN_PER_CLASS:
            yield f"Class {name} has {count} scans: at least {MIN_PER_CLASS} are needed."


def _broken_problems(broken: list[str]) -> Iterator[str]:
    yield from broken[:NAMED_FILES]
    if len(broken) > NAMED_FILES:
        yield f"{len(broken) - NAMED_FILES} more files cannot be read."


def _digest(scans: list[ScanFile]) -> str:
    """sha256 over the sorted (label, content sha256): the same scans under other names are the same dataset."""
    lines = sorted(f"{scan.label}\0{scan.sha256}\n" for scan in scans)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- manifest --------------------------------------------------------------------------------------------------------


def save_manifest(report: DatasetReport, path: Path) -> None:
    """Write the report as JSON."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    partial_path.replace(path)


def load_manifest(path: Path) -> DatasetReport:
    """Read what `save_manifest` wrote; BadDataset when there is none, or one that another version wrote."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataset("There is no dataset yet: run the stage data_ingestion first.") from error
    try:
        return _report_of(fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise BadDataset("Another version wrote the manifest: run the stage data_ingestion again.") from error


def _report_of(fields: dict[str, Any]) -> DatasetReport:
    lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("problems", "warnings") if name in fields}
    scans = tuple(ScanFile(**scan) for scan in fields["scans"])
    inspection = Inspection.from_json(fields.get("inspection", {}))
    rest: dict[str, Any] = {**fields, **lists, "scans": scans, "inspection": inspection}
    return DatasetReport(**rest)
