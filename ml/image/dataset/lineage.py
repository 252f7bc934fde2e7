"""The training lineage of a network, and leaks from training into the test scans.

A slice-level split is known to inflate accuracy by tens of points: Yagis et al., "Effect of data leakage in brain MRI
classification using 2D convolutional neural networks", Scientific Reports 11 (2021). `ml.image.dataset.splits` has no
such leak; but a network that starts from other weights has also learned from the scans that those were trained on. So a
model file carries the lineage of all scans that its weights learned from, and test scans are compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ml.image.dataset.perceptual_hash import match_any
from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import DatasetReport
from ml.image.dataset.splits import Split
from ml.runtime.errors import ModelFileError

_DIGITS = 16  # of the content hash in a token: 64 bits
_TOKEN = re.compile(
    rf"([0-9a-f]{{{_DIGITS}}})\.((?:[0-9a-f]{{64}})?)\.((?:[0-9a-f]{{16}})?)(?:\.([0-9a-f]{{16}}))?"
)  # content hash, perceptual hash, patient; and study, which earlier versions do not write


@dataclass(frozen=True)
class Leaks:
    """Numbers of test scans that share something with scans the network learned from."""

    patients: int = 0
    """Other scans of the same patient were learned from."""
    duplicates: int = 0
    """The identical file was learned from."""
    near_duplicates: int = 0
    """A near-duplicate, but not the identical file, was learned from."""
    studies: int = 0
    """Other scans of the same study, series or folder were learned from, and the patient does not tell already."""

    @property
    def any(self) -> bool:
        """True if there is a leak of any kind."""
        return bool(self.patients or self.studies or self.duplicates or self.near_duplicates)

    def reasons(self) -> list[str]:
        """A sentence for each kind of leak; without file names and patients."""
        counts = (
            (self.patients, "of patients of whom other scans were"),
            (self.studies, "of studies of which other scans were"),
            (self.duplicates, "copies of scans that were"),
            (self.near_duplicates, "near-duplicates of scans that were"),
        )
        return [
            f"{count} test {'scan is' if count == 1 else 'scans are'} {what} trained on."
            for count, what in counts
            if count
        ]


def lineage(report: DatasetReport, indices: Iterable[int]) -> tuple[str, ...]:
    """Tokens of the scans at `indices`, sorted and distinct: strings of about 115 characters without file names.

    A network that starts from other weights carries its own tokens and those of the weights. Patient hashes are
    pseudonyms (see `ml.image.dataset.patients`).
    """
    return tuple(sorted({_token(report.scans[index]) for index in indices}))


def leaks(report: DatasetReport, split: Split, ancestors: Sequence[str] = ()) -> Leaks:
    """Count test scans that share a patient, a study or a file with training or validation scans, or resemble one.

    `ancestors`: the lineage of the initial weights, which counts as well. Near-duplicates are compared pairwise, not
    transitively. ModelFileError for an ancestor that is no token of `lineage`.
    """
    patients, studies, copies, near = _shared(report, split, ancestors)
    counts = (patients, copies, near & ~copies, studies & ~patients)
    return Leaks(*(int(some.sum()) for some in counts))


def unseen_test_scans(report: DatasetReport, split: Split, ancestors: Sequence[str] = ()) -> np.ndarray:
    """Positions in `split.test` of the scans that `leaks` does not count."""
    return np.flatnonzero(~np.any(_shared(report, split, ancestors), axis=0))


def _shared(report: DatasetReport, split: Split, ancestors: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Which test scans share a patient, a study, a file or a perceptual hash with the training: bool [tested] each."""
    learned = [report.scans[index] for index in (*split.train, *split.validation)]
    earlier = [_parts(token) for token in ancestors]
    contents = {scan.sha256 for scan in learned} | {content for content, *_ in earlier}
    patients = {scan.patient for scan in learned} | {patient for _, _, patient, _ in earlier}
    studies = {token for scan in learned for token in _studies(scan)} | {study for *_, study in earlier}
    hashes = [scan.perceptual_hash for scan in learned] + [hash_ for _, hash_, _, _ in earlier]
    test = [report.scans[index] for index in split.test]
    of_patients = [scan.patient is not None and scan.patient in patients for scan in test]
    of_studies = [not studies.isdisjoint(_studies(scan)) for scan in test]
    copies = [_is_copy(scan, contents) for scan in test]
    near = match_any([scan.perceptual_hash for scan in test], hashes)
    return *(np.array(some, dtype=bool) for some in (of_patients, of_studies, copies)), near


def _studies(scan: ScanFile) -> tuple[str, ...]:
    """Study, series, space and folder: what is not of one patient only if the files lie."""
    return (scan.study, *scan.links) if scan.study else scan.links


def _is_copy(scan: ScanFile, contents: set[str]) -> bool:
    # All blank pictures may be the same file; learning from one of them leaks nothing about other patients.
    return scan.perceptual_hash != "" and (scan.sha256 in contents or scan.sha256[:_DIGITS] in contents)


def _token(scan: ScanFile) -> str:
    token = f"{scan.sha256[:_DIGITS]}.{scan.perceptual_hash or ''}.{scan.patient or ''}"
    return f"{token}.{scan.study}" if scan.study else token


def _parts(token: str) -> tuple[str, str, str, str]:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ModelFileError("The lineage of these weights is not one that RenalQ wrote.")
    return match.group(1), match.group(2), match.group(3), match.group(4) or ""
