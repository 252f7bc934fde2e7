"""Data quality of a dataset: counts for a report, and warnings with a remedy each.

Warnings contain no file names and no patients, so they may be logged and shown. Label conflicts name their two files,
as they cannot be fixed otherwise; they belong to the problems, which also name unreadable files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ml.image.dataset.perceptual_hash import group_near_duplicates

if TYPE_CHECKING:
    from ml.image.dataset.scan import ScanFile

TINY = 32  # pixels of the shorter side; upscaled from fewer, a scan is only blur
UNBALANCED = 3.0  # largest class / smallest class; from here on cross-entropy neglects the smallest
NAMED_CONFLICTS = 20  # conflicts that are listed by name; the rest is only counted


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
    stray_images: int = 0
    """Images outside of the class folders; they are ignored too."""
    patients: int = 0
    """Number of known patients."""
    with_patient: int = 0
    patients_with_several_labels: int = 0
    modalities: dict[str, int] = field(default_factory=dict)
    """DICOM modality → number of scans."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Inspection:
        """The inverse of `asdict`. TypeError for unknown fields."""
        sides = {name: Spread(**fields[name]) for name in ("height", "width") if fields.get(name)}
        return cls(**{**fields, **sides})


def inspect_scans(scans: Sequence[ScanFile], counts: dict[str, int], ignored: int = 0, stray: int = 0) -> Inspection:
    """Count everything. `counts`: scans per class; `ignored`: files that are no images; `stray`: images in no class."""
    read = [scan for scan in scans if scan.height]
    return Inspection(
        broken=len(scans) - len(read),
        tiny=sum(min(scan.height, scan.width) < TINY for scan in read),
        blank=sum(scan.perceptual_hash == "" for scan in read),
        duplicates=len(read) - len({scan.sha256 for scan in read}),
        conflicts=sum(len({scan.label for scan in copies}) > 1 for copies in _copies(read)),
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
        modalities=_counted(scan.modality for scan in read if scan.modality),
    )


def _copies(scans: Sequence[ScanFile]) -> list[list[ScanFile]]:
    """Groups of two or more scans with identical files; without blank scans, which contradict no label."""
    found: dict[str, list[ScanFile]] = {}
    for scan in scans:
        if scan.perceptual_hash != "":
            found.setdefault(scan.sha256, []).append(scan)
    return [copies for copies in found.values() if len(copies) > 1]


def _near_duplicates(scans: Sequence[ScanFile]) -> dict[str, int]:
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


def _patients(scans: Sequence[ScanFile]) -> dict[str, int]:
    labels: dict[str, set[str]] = {}
    for scan in scans:
        if scan.patient:
            labels.setdefault(scan.patient, set()).add(scan.label)
    return {
        "patients": len(labels),
        "with_patient": sum(scan.patient is not None for scan in scans),
        "patients_with_several_labels": sum(len(some) > 1 for some in labels.values()),
    }


def _counted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _spread(lengths: list[int]) -> Spread | None:
    return Spread(min(lengths), round(statistics.median(lengths)), max(lengths)) if lengths else None


# --- messages --------------------------------------------------------------------------------------------------------


def label_conflicts(scans: Sequence[ScanFile]) -> Iterator[str]:
    """A sentence for each picture that occurs under two labels, with the names of both files."""
    found = []
    for copies in _copies(scans):
        other = next((scan for scan in copies if scan.label != copies[0].label), None)
        if other:
            found.append(
                f"{copies[0].path} and {other.path} are the same picture under two labels: keep the right one."
            )
    yield from found[:NAMED_CONFLICTS]
    if len(found) > NAMED_CONFLICTS:
        yield f"{len(found) - NAMED_CONFLICTS} more pictures lie under two labels."


def dataset_warnings(inspection: Inspection, counts: dict[str, int]) -> tuple[str, ...]:
    """Findings that do not prevent training but degrade it or its scores, each with a remedy. No names in them."""
    scans = sum(counts.values())
    return (*_picture_warnings(inspection), *_label_warnings(inspection, counts), *_patient_warnings(inspection, scans))


def _picture_warnings(inspection: Inspection) -> Iterator[str]:
    if inspection.tiny:
        yield f"{_scans(inspection.tiny)} a side below {TINY} pixels: take the originals, enlarging adds nothing."
    if inspection.blank:
        yield f"{_scans(inspection.blank)} nothing but one grey level: remove what shows no anatomy."
    if inspection.duplicates:
        yield (
            f"{_scans(inspection.duplicates)} the same content as another one. Copies stay on one side of the split, "
            "but count more than once: remove them."
        )
    if inspection.near_duplicates:
        yield (
            f"{_scans(inspection.near_duplicates)} near-duplicates (the same picture resized, compressed or "
            f"brightened), in {inspection.near_duplicate_groups} groups. They stay on one side of the split: "
            "keep one of each."
        )
    if len(inspection.modes) > 1:
        yield f"Colour modes are mixed ({_listed(inspection.modes)}): if they go with a label, it is learned from them."
    if len(inspection.modalities) > 1:
        yield f"DICOM modalities are mixed ({_listed(inspection.modalities)}): train on one of them."


def _label_warnings(inspection: Inspection, counts: dict[str, int]) -> Iterator[str]:
    if inspection.near_conflicts:
        groups = "group of near-duplicates lies" if inspection.near_conflicts == 1 else "groups of near-duplicates lie"
        yield f"{inspection.near_conflicts} {groups} under several labels: look whether the labels are right."
    if inspection.imbalance is not None and inspection.imbalance >= UNBALANCED:
        least, most = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
        yield (
            f"Class {most} has {inspection.imbalance:.1f} times as many scans as {least}: set balance to weights or "
            "sampler, and look at F1, not at accuracy."
        )
    if inspection.stray_images:
        yield f"Images outside of the class folders are ignored: {inspection.stray_images}. Move them into a class."


def _patient_warnings(inspection: Inspection, scans: int) -> Iterator[str]:
    if scans and inspection.with_patient < scans:
        known = (
            f"The patient is known for {inspection.with_patient} of {scans} scans"
            if inspection.patients
            else ("Nothing tells the patients")
        )
        yield (
            f"{known}: slices of one patient may lie on both sides of the split, and the scores be too good. "
            "Name files like patient-0012_slice-3.png, or send DICOM with PatientID."
        )
    if inspection.patients_with_several_labels:
        yield (
            f"Patients with scans under several labels: {inspection.patients_with_several_labels}. Right if a label is "
            "the slice's, wrong if it is the patient's."
        )


def _scans(count: int) -> str:
    return "1 scan has" if count == 1 else f"{count} scans have"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
