"""A dataset folder with one subfolder per class: find, decode and check its scans; write and read its manifest."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml.image.dataset.evidence import Evidence, read_evidence, weigh
from ml.image.dataset.findings import blank_problems, dataset_warnings, label_conflicts
from ml.image.dataset.inspection import Inspection, inspect_scans
from ml.image.dataset.layout import Layout, Place, read_layout
from ml.image.dataset.patient_list import PatientList, read_patient_list
from ml.image.dataset.perceptual_hash import hash_image
from ml.image.dataset.scan import ScanFile
from ml.image.dataset.traits import read_traits
from ml.image.pixels.decoding import colour_mode, is_dicom, read
from ml.image.pixels.dicom import open_dataset
from ml.image.pixels.picture import Picture
from ml.runtime.errors import BadDataset, ImageError
from ml.runtime.prefetch import prefetch

MIN_PER_CLASS = 5  # with fewer, an 80/20 split cannot have a scan of each class on both sides
NAMED_FILES = 20  # broken and passed over files that are listed by name; the rest is only counted

OnPicture = Callable[[int, Picture], None]
OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset contains: scans per class, their total (`images`), and a digest of contents and labels.

    `problems` prevent training. `warnings` describe what degrades training or its scores, and how to fix it.
    `passed_over`: names of pictures that are not used, for the dataset's owner; no names are in `warnings`.
    """

    classes: dict[str, int]
    images: int
    digest: str
    problems: tuple[str, ...]
    scans: tuple[ScanFile, ...] = ()
    warnings: tuple[str, ...] = ()
    inspection: Inspection = field(default_factory=Inspection)
    passed_over: tuple[str, ...] = ()

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


# --- checking --------------------------------------------------------------------------------------------------------


def check_dataset(
    folder: Path,
    classes: int | None = None,
    on_picture: OnPicture | None = None,
    on_progress: OnProgress | None = None,
    window: tuple[float, float] | None = None,
) -> DatasetReport:
    """Decode every scan once and report problems; files are named relative to `folder`.

    Args:
        folder: has one subfolder per class.
        classes: the required number of classes; None for any.
        on_picture: called with each readable scan's index and picture in the order of the report's `scans`, so that
            callers need not decode again.
        on_progress: called with the fraction done, 0 to 1, after each scan.
        window: centre and width of the CT window in Hounsfield units; None: the window stored in each file.
    """
    layout, listed = _found(folder)
    read: list[_ReadScan] = []
    broken = []
    for index, one in enumerate(prefetch(lambda place: _read_scan(folder, window, place), layout.scans)):
        read.append(replace(one, picture=None))
        if one.picture is None:
            broken.append(f"{one.scan.path}: {one.problem}")
        elif on_picture:
            on_picture(index, one.picture)
        if on_progress:
            on_progress((index + 1) / len(layout.scans))
    return _report(layout, listed, read, broken, classes)


def count_images(folder: Path) -> int:
    """The number of scans that `check_dataset` will read."""
    return len(_found(folder)[0].scans)


def _found(folder: Path) -> tuple[Layout, PatientList]:
    layout = read_layout(folder)
    listed = read_patient_list(layout)
    return layout.relabelled(listed.labels), listed


def _report(
    layout: Layout, listed: PatientList, read: Sequence[_ReadScan], broken: list[str], classes: int | None
) -> DatasetReport:
    rows = [listed.rows.get(one.scan.path) for one in read]
    weighed = weigh([one.evidence for one in read], [one.scan.label for one in read], rows)
    scans = [
        replace(
            one.scan,
            **asdict(belonging),
            side=(row and row.side) or one.scan.side,
            traits={**one.scan.traits, **(row.traits if row else {})},
        )
        for one, belonging, row in zip(read, weighed.belongings, rows, strict=True)
    ]
    counts = dict(sorted(Counter(scan.label for scan in scans).items()))
    pictures = tuple(layout.passed_over_pictures())
    inspection = replace(
        inspect_scans(scans, counts, len(layout.others), len(layout.strays)),
        junk_files=len(layout.junk),
        junk_pictures=len(pictures) - len(layout.strays),
        common_identity=weighed.common_identity,
        shared_uids=weighed.shared_uids,
        joined_identities=weighed.joined_identities,
        disagreeing=weighed.disagreeing,
        unlisted=rows.count(None) if listed.rows else 0,
    )
    problems = (
        *layout.problems(),
        *_shape_problems(counts, classes),
        *listed.problems,
        *_broken_problems(broken),
        *label_conflicts(scans),
        *blank_problems(inspection),
    )
    warnings = dataset_warnings(inspection, counts)
    named = _named(pictures)
    return DatasetReport(counts, len(scans), _digest(scans), problems, tuple(scans), warnings, inspection, named)


def _named(names: tuple[str, ...]) -> tuple[str, ...]:
    more = len(names) - NAMED_FILES
    return (*names[:NAMED_FILES], *([f"and {more} more"] if more > 0 else []))


@dataclass(frozen=True)
class _ReadScan:
    """A scan, what it tells of its patient, and its picture, or why it cannot be read."""

    scan: ScanFile
    evidence: Evidence
    problem: str | None = None
    picture: Picture | None = None


def _read_scan(folder: Path, window: tuple[float, float] | None, place: Place) -> _ReadScan:
    # Patients are searched below the class folder only: one in a parent folder's name would apply to every scan.
    evidence = Evidence(place.below)
    label = unicodedata.normalize("NFC", place.label or "")
    scan = ScanFile(place.name, label, "", None, side=place.side)
    try:
        content = (folder / place.name).read_bytes()
    except OSError:
        return _ReadScan(scan, evidence, "the file cannot be opened.")
    scan = replace(scan, sha256=hashlib.sha256(content).hexdigest())
    try:
        picture, mode = read(content, window), colour_mode(content)
        if is_dicom(content):
            header = open_dataset(content, header_only=True)
            evidence, scan = read_evidence(place.below, header), replace(scan, traits=read_traits(header))
    except ImageError as error:
        return _ReadScan(scan, evidence, str(error))
    height, width = picture.pixels.shape[:2]
    window = (picture.window.centre, picture.window.width) if picture.window else None
    scan = replace(
        scan, perceptual_hash=hash_image(picture.pixels), height=height, width=width, mode=mode,
        modality=picture.origin.modality, body_part=picture.origin.body_part, kind=picture.origin.kind, window=window,
    )  # fmt: skip
    return _ReadScan(scan, evidence, None, picture)


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
    lists: dict[str, Any] = {
        name: tuple(fields[name]) for name in ("problems", "warnings", "passed_over") if name in fields
    }
    scans = tuple(ScanFile.from_json(scan) for scan in fields["scans"])
    inspection = Inspection.from_json(fields.get("inspection", {}))
    rest: dict[str, Any] = {**fields, **lists, "scans": scans, "inspection": inspection}
    return DatasetReport(**rest)
