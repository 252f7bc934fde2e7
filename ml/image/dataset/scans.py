"""A dataset folder with one subfolder per class: find, decode and check its scans; write and read its manifest."""

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

from ml.image.dataset.inspection import Inspection, dataset_warnings, inspect_scans, label_conflicts
from ml.image.dataset.patients import patient_of
from ml.image.dataset.perceptual_hash import hash_image
from ml.image.dataset.scan import ScanFile
from ml.image.pixels.decoding import SUFFIXES, colour_mode, decode, is_dicom
from ml.runtime.errors import BadDataset, ImageError
from ml.runtime.prefetch import prefetch

MIN_PER_CLASS = 5  # with fewer, an 80/20 split cannot have a scan of each class on both sides
NAMED_FILES = 20  # broken files listed by name in the problems; the rest is only counted
_MAX_WRAPPERS = 2  # levels of folders that a zip may have around its class folders
_MODALITY = re.compile(r"[A-Z]{2,16}")

OnPixels = Callable[[int, np.ndarray], None]
OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset contains: scans per class, their total (`images`), and a digest of contents and labels.

    `problems` prevent training. `warnings` describe what degrades training or its scores, and how to fix it.
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
        """The class index of each scan, int64 [images]."""
        index = {name: number for number, name in enumerate(self.names)}
        return np.array([index[scan.label] for scan in self.scans], dtype=np.int64)

    def digest_of(self, scans: Iterable[int]) -> str:
        """Identifies a set of scans: scores of two networks are comparable if their test scans have the same digest."""
        chosen = sorted(f"{self.scans[scan].label}\0{self.scans[scan].sha256}" for scan in scans)
        return hashlib.sha256("\n".join(chosen).encode()).hexdigest()

    def raise_for_problems(self) -> None:
        """BadDataset with all problems, if there are any."""
        if self.problems:
            raise BadDataset(" ".join(self.problems))


# --- finding ---------------------------------------------------------------------------------------------------------


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name → its image files (searched recursively), sorted; skips up to two levels of wrapper folders."""
    return {sub.name: sorted(path for path in sub.rglob("*") if _is_image(path)) for sub in _class_folders(folder)}


def _class_folders(folder: Path) -> list[Path]:
    root = folder
    for _ in range(_MAX_WRAPPERS):
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
    # DICOM files often have no suffix; files such as readme.txt and labels.csv are no scans.
    return path.is_file() and not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or not path.suffix)


def _count_unused(folder: Path, found: dict[str, list[Path]]) -> tuple[int, int]:
    """Files that belong to no class: (files that are no images, images outside of the class folders)."""
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
    on_pixels: OnPixels | None = None,
    on_progress: OnProgress | None = None,
    window: tuple[float, float] | None = None,
) -> DatasetReport:
    """Decode every scan once and report problems; files are named relative to `folder`.

    Args:
        folder: has one subfolder per class.
        classes: the required number of class folders; None for any.
        on_pixels: called with each readable scan's index and pixels (uint8 [height, width, 3]) in the order of the
            report's `scans`, so that callers need not decode again.
        on_progress: called with the fraction done, 0 to 1, after each scan.
        window: centre and width of the CT window in Hounsfield units; None: the window stored in each file.
    """
    found = find_classes(folder)
    counts = {name: len(paths) for name, paths in found.items()}
    scans, broken = [], []
    for index, (scan, problem, pixels) in enumerate(_read_all(folder, found, window)):
        scans.append(scan)
        if problem or pixels is None:
            broken.append(f"{scan.path}: {problem}")
        elif on_pixels:
            on_pixels(index, pixels)
        if on_progress:
            on_progress((index + 1) / sum(counts.values()))
    problems = (*_shape_problems(counts, classes), *_broken_problems(broken), *label_conflicts(scans))
    inspection = inspect_scans(scans, counts, *_count_unused(folder, found))
    warnings = dataset_warnings(inspection, counts)
    return DatasetReport(counts, len(scans), _digest(scans), problems, tuple(scans), warnings, inspection)


def count_images(folder: Path) -> int:
    """The number of scans that `check_dataset` will read."""
    return sum(len(paths) for paths in find_classes(folder).values())


ReadScan = tuple[ScanFile, str | None, np.ndarray | None]
"""The scan, why it cannot be read, and its pixels."""


def _read_all(folder: Path, found: dict[str, list[Path]], window: tuple[float, float] | None) -> Iterator[ReadScan]:
    # Patient ids are searched below the class folder only: one in a parent folder's name would apply to every scan.
    roots = {root.name: root for root in _class_folders(folder)}
    work = [(path, label) for label, paths in found.items() for path in paths]
    return prefetch(lambda item: _read_scan(folder, roots[item[1]], window, item), work)


def _read_scan(folder: Path, root: Path, window: tuple[float, float] | None, item: tuple[Path, str]) -> ReadScan:
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
    return replace(scan, perceptual_hash=hash_image(pixels), height=height, width=width, mode=mode), None, pixels


def _dicom_header(content: bytes) -> tuple[str | None, str | None]:
    """(PatientID, modality); None for missing values and for files that are not DICOM."""
    if not is_dicom(content):
        return None, None
    import pydicom

    try:
        tags = ["PatientID", "Modality"]
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=tags)
        identity, modality = str(header.get("PatientID") or ""), str(header.get("Modality") or "")
    except Exception:  # a damaged header: decoding reports the file as broken
        return None, None
    # Free text in the modality tag could contain a name, so it is not kept.
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
    """SHA-256 over the sorted (label, content hash) pairs, so file names do not matter."""
    lines = sorted(f"{scan.label}\0{scan.sha256}\n" for scan in scans)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- manifest --------------------------------------------------------------------------------------------------------


def save_manifest(report: DatasetReport, path: Path) -> None:
    """Write the report as JSON, atomically."""
    partial_path = path.with_name(f".{path.name}.partial")
    fields = asdict(report) | {"scans": [scan.as_json() for scan in report.scans]}
    partial_path.write_text(json.dumps(fields, indent=1), encoding="utf-8")
    partial_path.replace(path)


def load_manifest(path: Path) -> DatasetReport:
    """Read what `save_manifest` wrote. BadDataset if there is no manifest, or if another version wrote it."""
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
    scans = tuple(ScanFile.from_json(scan) for scan in fields["scans"])
    inspection = Inspection.from_json(fields.get("inspection", {}))
    rest: dict[str, Any] = {**fields, **lists, "scans": scans, "inspection": inspection}
    return DatasetReport(**rest)
