"""A folder of scans, one folder a class: found, checked, counted, and split so that no patient is on both sides."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ml.ahead import ahead
from ml.errors import BadDataset, ImageError
from ml.images import SUFFIXES, decode, is_dicom

MIN_PER_CLASS = 5  # fewer cannot be split 80/20 with a scan of each class on both sides
NAMED_FILES = 20  # broken files named in the problems; the rest is counted
_WRAPPERS = 2  # folders around the class folders that a zip may have
_PATIENT = re.compile(r"(?:^|[/_\-. ])(?:patient|pat|p)[_\- ]?(\d+)(?=[/_\-. ]|$)", re.IGNORECASE)

Sink = Callable[[int, np.ndarray], None]
Report = Callable[[float], None]


@dataclass(frozen=True)
class ScanFile:
    """One scan of a dataset. `patient` is a hash, never the id itself; None where nothing tells the patient."""

    path: str
    label: str
    sha256: str
    patient: str | None


@dataclass(frozen=True)
class DatasetReport:
    """What a folder holds: scans a class, their number, a digest of contents and labels, and what is wrong."""

    classes: dict[str, int]
    images: int
    digest: str
    problems: tuple[str, ...]
    scans: tuple[ScanFile, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the network's outputs."""
        return tuple(self.classes)

    @property
    def labels(self) -> np.ndarray:
        """Each scan's class as an index: int64 [images]."""
        index = {name: number for number, name in enumerate(self.names)}
        return np.array([index[scan.label] for scan in self.scans], dtype=np.int64)

    def raise_for_problems(self) -> None:
        """BadDataset with all reasons when there is one."""
        if self.problems:
            raise BadDataset(" ".join(self.problems))


# --- finding ---------------------------------------------------------------------------------------------------------


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name → its image files (also those in folders below), sorted; looks through up to two wrapper folders."""
    root = folder
    for _ in range(_WRAPPERS):
        below = _subfolders(root)
        if len(below) != 1 or _images_in(root) or _images_in(below[0]) or not _subfolders(below[0]):
            break
        root = below[0]
    return {sub.name: sorted(path for path in sub.rglob("*") if _is_image(path)) for sub in _subfolders(root)}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith((".", "__MACOSX")))


def _images_in(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())


def _is_image(path: Path) -> bool:
    # DICOM files often have no suffix at all; readme.txt and labels.csv are nobody's scan.
    return path.is_file() and not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or not path.suffix)


# --- checking --------------------------------------------------------------------------------------------------------


def check_dataset(
    folder: Path, classes: int | None = None, sink: Sink | None = None, report: Report | None = None
) -> DatasetReport:
    """Decode every scan once and say what is wrong, naming files relative to `folder`.

    `classes`: how many class folders there must be. `sink` gets each scan's index and pixels (uint8 [h, w, 3]) in the
    order of `scans`, so that whoever needs the pixels need not decode again. `report` hears the fraction done.
    """
    found = find_classes(folder)
    counts = {name: len(paths) for name, paths in found.items()}
    scans, broken = [], []
    for index, (scan, problem, pixels) in enumerate(_examined(folder, found)):
        scans.append(scan)
        if problem or pixels is None:
            broken.append(f"{scan.path}: {problem}")
        elif sink:
            sink(index, pixels)
        if report:
            report((index + 1) / sum(counts.values()))
    problems = (*_shape_problems(counts, classes), *_broken_problems(broken))
    return DatasetReport(counts, len(scans), _digest(scans), problems, tuple(scans))


def count_images(folder: Path) -> int:
    """How many scans `check_dataset` will look at."""
    return sum(len(paths) for paths in find_classes(folder).values())


def _examined(folder: Path, found: dict[str, list[Path]]) -> Iterator[tuple[ScanFile, str | None, np.ndarray | None]]:
    work = [(path, label) for label, paths in found.items() for path in paths]
    return ahead(partial(_examine, folder), work)


def _examine(folder: Path, item: tuple[Path, str]) -> tuple[ScanFile, str | None, np.ndarray | None]:
    path, label = item
    name = path.relative_to(folder).as_posix()
    try:
        content = path.read_bytes()
    except OSError:
        return ScanFile(name, label, "", None), "the file cannot be opened.", None
    scan = ScanFile(name, label, hashlib.sha256(content).hexdigest(), _patient(name, content))
    try:
        return scan, None, decode(content)
    except ImageError as error:
        return scan, str(error), None


def _patient(name: str, content: bytes) -> str | None:
    told = _PATIENT.search(name)
    identity = told.group(1) if told else _dicom_patient(content)
    return hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else None


def _dicom_patient(content: bytes) -> str | None:
    if not is_dicom(content):
        return None
    import io

    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=["PatientID"])
    except Exception:  # a damaged header: decoding names the file as broken
        return None
    return str(header.get("PatientID") or "") or None


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
    """Read what `save_manifest` wrote; BadDataset when there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataset("There is no dataset yet: run the stage data_ingestion first.") from error
    scans = tuple(ScanFile(**scan) for scan in fields["scans"])
    return DatasetReport(fields["classes"], fields["images"], fields["digest"], tuple(fields["problems"]), scans)


# --- splitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Indices of scans, int64, sorted: what is trained on, and what training never sees."""

    train: np.ndarray
    held_out: np.ndarray


def split_scans(report: DatasetReport, seed: int, held_out: float = 0.2) -> Split:
    """A stratified split. Scans of one patient, and copies of one picture, stay on one side.

    Patients (or, where nothing tells them, scans) are drawn in the order of a hash of `seed` and themselves, until each
    class has its share. So a scan that was held out from one network is hardly ever trained on by the next one when the
    dataset has only grown. BadDataset when the patients are too few to have every class on both sides.
    """
    labels = report.labels
    members: dict[int, list[int]] = {}
    for index, group in enumerate(_groups(report.scans)):
        members.setdefault(int(group), []).append(index)
    groups = sorted(members.values(), key=lambda indices: _lot(report.scans, indices, seed))
    held = _draw(groups, labels, held_out)
    train = np.setdiff1d(np.arange(len(labels)), held)
    if set(labels[train]) != set(labels) or set(labels[held]) != set(labels):
        raise BadDataset("The patients are too few to train and to test on every class: add scans of more patients.")
    return Split(train, held)


def _lot(scans: tuple[ScanFile, ...], indices: list[int], seed: int) -> str:
    """A group's place in the draw: it depends on the seed and the group alone, not on what else is in the dataset."""
    name = min(scans[index].patient or scans[index].sha256 for index in indices)
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def _draw(groups: list[list[int]], labels: np.ndarray, held_out: float) -> np.ndarray:
    """Indices of the groups that are held out: in order, each that brings none of its classes far past its share."""
    counts = [np.bincount(labels[group], minlength=labels.max() + 1) for group in groups]
    share = np.rint(held_out * np.bincount(labels))
    held, drawn = np.zeros_like(share), []
    for group, count in zip(groups, counts, strict=True):
        if np.all((held + count / 2 <= share)[count > 0]):
            held += count
            drawn += group
    for label in np.flatnonzero(held == 0):  # a class whose every patient is larger than its share
        first = next(number for number, count in enumerate(counts) if count[label])
        held += counts[first]
        drawn += groups[first]
    return np.unique(np.array(drawn, dtype=np.int64))


def _groups(scans: tuple[ScanFile, ...]) -> np.ndarray:
    """A number for each scan; the same for scans that share a patient or a content, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    tokens: dict[str, int] = {}
    edges = []
    for index, scan in enumerate(scans):
        for token in (f"content {scan.sha256}", scan.patient and f"patient {scan.patient}"):
            if token:
                edges.append((index, len(scans) + tokens.setdefault(token, len(tokens))))
    rows, columns = zip(*edges, strict=True)
    size = len(scans) + len(tokens)
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][: len(scans)])
