"""Sentences about a dataset: problems, and warnings with a remedy each.

Warnings contain no file names and no patients, so they may be logged and shown. Label conflicts name their two files,
as they cannot be fixed otherwise; they belong to the problems, which also name unreadable files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ml.image.dataset.inspection import SENSITIVITY, TEST_SIZE, TINY, Inspection, copies_of
from ml.image.dataset.scan import ScanFile

UNBALANCED = 3.0  # largest class / smallest class; from here on cross-entropy neglects the smallest
MOST_BLANK = 0.2  # share of the scans
LARGEST_SHARE = 0.3  # of the scans of a class, of one patient
WIDE = 0.3  # width of an interval from which on it says little: fewer than about 16 patients in the test part
LEAST_GROUPS = 3  # of a class, one for each side of the split
NAMED_CONFLICTS = 20  # conflicts that are listed by name; the rest is only counted


def label_conflicts(scans: Sequence[ScanFile]) -> Iterator[str]:
    """A sentence for each picture that occurs under two labels, with the names of both files."""
    found = []
    for copies in copies_of(scans):
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
    return (
        *_picture_warnings(inspection),
        *_label_warnings(inspection, counts),
        *_layout_warnings(inspection),
        *_evidence_warnings(inspection),
        *_thin_warnings(inspection),
        *_patient_warnings(inspection, sum(counts.values())),
    )


def blank_problems(inspection: Inspection) -> Iterator[str]:
    """A sentence, if more than a fifth of the scans that could be read are blank."""
    read = sum(inspection.modes.values())
    if inspection.blank > MOST_BLANK * read:
        yield (
            f"{inspection.blank} of {read} scans show nothing but one grey level, which is more than a fifth. Look how "
            "they were exported, and remove what shows no anatomy."
        )


def _picture_warnings(inspection: Inspection) -> Iterator[str]:
    if inspection.tiny:
        yield f"{_scans(inspection.tiny)} a side below {TINY} pixels: take the originals, enlarging adds nothing."
    if inspection.blank:
        yield (
            f"{_scans(inspection.blank)} nothing but one grey level: remove what shows no anatomy. Blank scans never "
            "test or calibrate."
        )
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
    if inspection.windows > 1:
        yield (
            f"CT files are shown with {inspection.windows} different windows, so that one tissue has several greys: "
            "set window_center and window_width."
        )


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


def _layout_warnings(inspection: Inspection) -> Iterator[str]:
    if inspection.stray_images:
        yield f"Images outside of the class folders are ignored: {inspection.stray_images}. Move them into a class."
    if inspection.junk_files:
        pictures = f", of which {inspection.junk_pictures} are pictures" if inspection.junk_pictures else ""
        yield (
            f"Hidden files, and what systems and licences put beside scans, are passed over: {inspection.junk_files}"
            f"{pictures}."
        )
    if inspection.ignored_files:
        yield f"Files that are no pictures are passed over: {inspection.ignored_files}."
    if inspection.sides:
        yield (
            f"The scans come in sides of a split ({_listed(inspection.sides)}). These are no classes; they are pooled, "
            "and split anew by patients. Set split to folders to keep them."
        )
    if inspection.groups_on_several_sides:
        yield (
            f"Patients, copies or near-duplicates that lie on several of these sides: "
            f"{inspection.groups_on_several_sides}. With split: folders the scores would be too good."
        )


def _evidence_warnings(inspection: Inspection) -> Iterator[str]:
    if inspection.unlisted:
        yield f"Scans that patients.csv does not list: {inspection.unlisted}. For them DICOM and names count."
    if inspection.common_identity:
        yield (
            f"PatientID is one value for many studies in {inspection.common_identity} scans, so it counts as a "
            "placeholder. Scans of one study stay together; list the patients in patients.csv."
        )
    if inspection.shared_uids:
        yield (
            f"{_scans(inspection.shared_uids)} a study, series or space in common with most patients: these UIDs "
            "count for nothing. Look how the files were anonymized."
        )
    if inspection.joined_identities:
        yield (
            f"{_scans(inspection.joined_identities)} a study, series or space in common with another PatientID: they "
            "stay together. If they are of different patients, list these in patients.csv."
        )
    if inspection.disagreeing:
        yield (
            f"Scans whose names tell other patients than their PatientIDs: {inspection.disagreeing}. PatientID counts; "
            "if it is wrong, list the patients in patients.csv."
        )


def _thin_warnings(inspection: Inspection) -> Iterator[str]:
    """The class where it is worst, and how many more there are."""
    crowded = [name for name, share in inspection.largest_share.items() if share >= LARGEST_SHARE]
    if crowded:
        worst = max(crowded, key=lambda name: inspection.largest_share[name])
        share = inspection.largest_share[worst]
        yield (
            f"One patient has {share:.0%} of the scans of class {worst}{_more(crowded)}: the network may learn the "
            "patient. Add others."
        )
    lacking = [name for name, groups in inspection.groups.items() if groups < LEAST_GROUPS]
    if lacking:
        worst = min(lacking, key=lambda name: inspection.groups[name])
        noun = "patients, copies aside" if inspection.with_patient else "different scans"
        yield (
            f"Class {worst} has {inspection.groups[worst]} {noun}{_more(lacking)}: training refuses fewer than "
            f"{LEAST_GROUPS}, one each to train, to validate and to test on. If patients are told wrongly, list them "
            "in patients.csv."
        )
    few = [name for name, (low, high) in inspection.sensitivity.items() if high - low > WIDE]
    if few:
        worst = min(few, key=lambda name: inspection.groups[name])
        groups, (low, high) = inspection.groups[worst], inspection.sensitivity[worst]
        noun = "patients" if inspection.with_patient else "different scans"
        yield (
            f"Class {worst} has {groups} {noun}, of which about {max(1, round(TEST_SIZE * groups))} will test"
            f"{_more(few)}: a sensitivity of {SENSITIVITY:g} would be known no better than from {low:.2f} to "
            f"{high:.2f}. Add {noun}."
        )


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more {'class is' if len(names) == 2 else 'classes are'} like it)" if names[1:] else ""


def _patient_warnings(inspection: Inspection, scans: int) -> Iterator[str]:
    if scans and inspection.with_patient < scans:
        known = (
            f"The patient is known for {inspection.with_patient} of {scans} scans"
            if inspection.patients
            else ("Nothing tells the patients")
        )
        yield (
            f"{known}: slices of one patient may lie on both sides of the split, and the scores be too good. "
            "Name files like patient-0012_slice-3.png, send DICOM with PatientID, or list the patients in patients.csv."
        )
    if inspection.with_study:
        yield f"For {inspection.with_study} of these scans the study is known, and stays on one side of the split."
    if inspection.patients_with_several_labels:
        yield (
            f"Patients with scans under several labels: {inspection.patients_with_several_labels}. Right if a label is "
            "the slice's, wrong if it is the patient's."
        )


def _scans(count: int) -> str:
    return "1 scan has" if count == 1 else f"{count} scans have"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
