"""Data quality of a dataset: counts for a report. `ml.image.dataset.findings` makes sentences of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml.evaluation.intervals import wilson
from ml.image.dataset.grouping import group_scans, is_blank
from ml.image.dataset.perceptual_hash import group_near_duplicates
from ml.image.dataset.scan import ScanFile
from ml.spec.image import Params

TINY = 32  # pixels of the shorter side; upscaled from fewer, a scan is only blur
SENSITIVITY = 0.9  # for which the expected interval is computed
TEST_SIZE: float = Params.model_fields["test_size"].default


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of a length in pixels."""

    least: int
    median: int
    greatest: int


@dataclass(frozen=True)
class Inspection:
    """Counts of scans, unless documented otherwise. To JSON by `dataclasses.asdict`, and back by `from_json`."""

    broken: int = 0
    tiny: int = 0
    blank: int = 0
    duplicates: int = 0
    """Scans whose file is identical to an earlier one."""
    conflicts: int = 0
    """Distinct files that occur under several labels."""
    near_duplicates: int = 0
    """Scans in groups of near-duplicates, without identical files."""
    near_duplicate_groups: int = 0
    """Number of groups of near-duplicates."""
    near_conflicts: int = 0
    """Groups of near-duplicates under several labels."""
    largest_group: int = 0
    """Scans in the largest group of near-duplicates."""
    imbalance: float | None = None
    """Scans of the largest class / scans of the smallest class."""
    modes: dict[str, int] = field(default_factory=dict)
    height: Spread | None = None
    width: Spread | None = None
    sizes: int = 0
    """Number of distinct (height, width) pairs."""
    label_folders: int = 0
    ignored_files: int = 0
    """Files that are not images."""
    junk_files: int = 0
    """Files that are passed over by their names; see `ml.spec.junk_files`."""
    junk_pictures: int = 0
    """Those of them that are pictures."""
    stray_images: int = 0
    """Images outside of the class folders; they are ignored too."""
    sides: dict[str, int] = field(default_factory=dict)
    """Scans in folders (or rows of patients.csv) of train, validation and test."""
    groups_on_several_sides: int = 0
    patients: int = 0
    """Number of known patients."""
    with_patient: int = 0
    patients_with_several_labels: int = 0
    patient_sources: dict[str, int] = field(default_factory=dict)
    """What told the patient (patients.csv, PatientID, names) → number of scans."""
    with_study: int = 0
    """Scans whose study is known, but not their patient."""
    unlisted: int = 0
    """Scans that patients.csv does not list, if there is one."""
    common_identity: int = 0
    """Scans with a PatientID that is no more than a placeholder, as it has too many studies."""
    shared_uids: int = 0
    """Scans with UIDs that most patients have; these UIDs count for nothing."""
    joined_identities: int = 0
    """Scans with UIDs that scans with another PatientID have too; they stay together."""
    disagreeing: int = 0
    """Scans whose names tell other patients than their PatientIDs."""
    groups: dict[str, int] = field(default_factory=dict)
    """Class → its number of independent groups: patients, as far as they are known, without blank scans."""
    largest_share: dict[str, float] = field(default_factory=dict)
    """Class → share of its scans that are of one known patient, of whom it has most."""
    sensitivity: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Class → Wilson's 95 % interval of a sensitivity of 0.9 that its groups in a test part of a fifth can give."""
    modalities: dict[str, int] = field(default_factory=dict)
    """DICOM modality → number of scans."""
    windows: int = 0
    """Number of distinct windows that CT files were shown with."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Inspection:
        """The inverse of `asdict`. TypeError for unknown fields."""
        sides = {name: Spread(**fields[name]) for name in ("height", "width") if fields.get(name)}
        intervals = {name: tuple(bounds) for name, bounds in fields.get("sensitivity", {}).items()}
        return cls(**{**fields, **sides, **({"sensitivity": intervals} if intervals else {})})


def inspect_scans(scans: Sequence[ScanFile], counts: dict[str, int], ignored: int = 0, stray: int = 0) -> Inspection:
    """Count everything. `counts`: scans per class; `ignored`: files that are no images; `stray`: images in no class."""
    read = [scan for scan in scans if scan.height]
    return Inspection(
        broken=len(scans) - len(read),
        tiny=sum(min(scan.height, scan.width) < TINY for scan in read),
        blank=sum(map(is_blank, read)),
        duplicates=len(read) - len({scan.sha256 for scan in read}),
        conflicts=sum(len({scan.label for scan in copies}) > 1 for copies in copies_of(read)),
        **_near_duplicates(read),
        imbalance=round(max(counts.values()) / min(counts.values()), 2) if counts and min(counts.values()) else None,
        modes=_counted(scan.mode for scan in read),
        height=_spread([scan.height for scan in read]),
        width=_spread([scan.width for scan in read]),
        sizes=len({(scan.height, scan.width) for scan in read}),
        label_folders=len(counts),
        ignored_files=ignored,
        stray_images=stray,
        **_patients(scans),
        **_groups(scans),
        largest_share={name: share for name in counts if (share := _largest_share(scans, name))},
        modalities=_counted(scan.modality for scan in read if scan.modality),
        windows=len({scan.window for scan in read if scan.window and scan.modality == "CT"}),
    )


def copies_of(scans: Sequence[ScanFile]) -> list[list[ScanFile]]:
    """Groups of two or more scans with identical files; without blank scans, which contradict no label."""
    found: dict[str, list[ScanFile]] = {}
    for scan in scans:
        if not is_blank(scan):
            found.setdefault(scan.sha256, []).append(scan)
    return [copies for copies in found.values() if len(copies) > 1]


def _near_duplicates(scans: Sequence[ScanFile]) -> dict[str, Any]:
    distinct = list({scan.sha256: scan for scan in scans}.values())
    groups: dict[int, list[ScanFile]] = {}
    for scan, number in zip(distinct, group_near_duplicates([scan.perceptual_hash for scan in distinct]), strict=True):
        groups.setdefault(int(number), []).append(scan)
    large = [group for group in groups.values() if len(group) > 1]
    return {
        "near_duplicates": sum(map(len, large)),
        "near_duplicate_groups": len(large),
        "near_conflicts": sum(len({scan.label for scan in group}) > 1 for group in large),
        "largest_group": max(map(len, large), default=0),
    }


def _patients(scans: Sequence[ScanFile]) -> dict[str, Any]:
    labels: dict[str, set[str]] = {}
    for scan in scans:
        if scan.patient:
            labels.setdefault(scan.patient, set()).add(scan.label)
    return {
        "patients": len(labels),
        "with_patient": sum(scan.patient is not None for scan in scans),
        "patients_with_several_labels": sum(len(some) > 1 for some in labels.values()),
        "patient_sources": _counted(scan.source for scan in scans if scan.source),
        "with_study": sum(scan.study is not None and scan.patient is None for scan in scans),
    }


def _groups(scans: Sequence[ScanFile]) -> dict[str, Any]:
    pairs = list(zip(scans, group_scans(scans).tolist(), strict=True)) if scans else []
    counts = Counter(label for label, _ in {(scan.label, group) for scan, group in pairs if not is_blank(scan)})
    on_sides = Counter(group for _, group in {(scan.side, group) for scan, group in pairs if scan.side})
    return {
        "groups": dict(sorted(counts.items())),
        "sensitivity": {name: _expected_interval(count) for name, count in sorted(counts.items())},
        "sides": _counted(scan.side for scan in scans if scan.side),
        "groups_on_several_sides": sum(count > 1 for count in on_sides.values()),
    }


def _expected_interval(groups: int) -> tuple[float, float]:
    low, high = wilson(SENSITIVITY, max(1, round(TEST_SIZE * groups)))
    return round(low, 3), round(high, 3)


def _largest_share(scans: Sequence[ScanFile], label: str) -> float:
    """Of the class's scans; 0 if no patient is known."""
    patients = [scan.patient for scan in scans if scan.label == label]
    known = Counter(patient for patient in patients if patient)
    return round(max(known.values()) / len(patients), 3) if known else 0.0


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _spread(lengths: list[int]) -> Spread | None:
    return Spread(min(lengths), round(statistics.median(lengths)), max(lengths)) if lengths else None
