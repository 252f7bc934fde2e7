"""What a network has learned from, and whether its test is honest.

A slice-level split is known to inflate accuracy by tens of points: Yagis et al., "Effect of data leakage in brain MRI
classification using 2D convolutional neural networks", Scientific Reports 11 (2021). A split of ours has no such leak
inside; but a network that goes on from other weights has also learned from what those were trained on. So weights carry
the lineage of all scans that they learned from, and the test is compared with that too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ml.image.dataset.perceptual_hash import resembling
from ml.image.dataset.scan import ScanFile
from ml.image.dataset.scans import DatasetReport
from ml.image.dataset.splits import Split
from ml.runtime.errors import ModelFileError

_DIGITS = 16  # of the content's hash in a token: 64 bits
_TOKEN = re.compile(
    rf"([0-9a-f]{{{_DIGITS}}})\.((?:[0-9a-f]{{64}})?)\.((?:[0-9a-f]{{16}})?)"
)  # content, likeness, patient


@dataclass(frozen=True)
class Leaks:
    """Test scans that share something with what the network learned from."""

    patients: int = 0
    """Scans of a patient of whom others were learned from."""
    duplicates: int = 0
    """Scans of which the very file was learned from."""
    near_duplicates: int = 0
    """Scans that are no such copies, but near-duplicates of one that was learned from."""

    @property
    def any(self) -> bool:
        """Whether the scores say more about memory than about the network."""
        return bool(self.patients or self.duplicates or self.near_duplicates)

    def reasons(self) -> list[str]:
        """A sentence for each kind of leak, without names."""
        counts = (
            (self.patients, "of patients of whom other scans were"),
            (self.duplicates, "copies of scans that were"),
            (self.near_duplicates, "near-duplicates of scans that were"),
        )
        return [
            f"{count} test {'scan is' if count == 1 else 'scans are'} {what} trained on."
            for count, what in counts
            if count
        ]


def lineage(report: DatasetReport, indices: Iterable[int]) -> tuple[str, ...]:
    """Tokens of the scans at `indices`, sorted, each once: about 100 characters, JSON-able, and no names in them.

    A network that goes on from other weights carries its own tokens and those of the weights. Patients' hashes are
    pseudonyms (see `ml.image.dataset.patients`).
    """
    return tuple(sorted({_token(report.scans[index]) for index in indices}))


def leaks(report: DatasetReport, split: Split, ancestors: Sequence[str] = ()) -> Leaks:
    """Count the test scans that share a patient, a content or a near-duplicate with train, validation or `ancestors`.

    `ancestors`: the lineage of the weights that training began from. Compared directly, not through third scans.
    ModelFileError for an ancestor that is no token of `lineage`.
    """
    patients, copies, near = _shared(report, split, ancestors)
    return Leaks(int(patients.sum()), int(copies.sum()), int((near & ~copies).sum()))


def unlearnt(report: DatasetReport, split: Split, ancestors: Sequence[str] = ()) -> np.ndarray:
    """The test scans of which nothing was learnt, as places among `split.test`: those that `leaks` does not count."""
    patients, copies, near = _shared(report, split, ancestors)
    return np.flatnonzero(~(patients | copies | near))


def _shared(report: DatasetReport, split: Split, ancestors: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which test scans share a patient, a content, a likeness with what was learnt from: bool [tested] each."""
    learned = [report.scans[index] for index in (*split.train, *split.validation)]
    earlier = [_parts(token) for token in ancestors]
    contents = {scan.sha256 for scan in learned} | {content for content, _, _ in earlier}
    patients = {scan.patient for scan in learned} | {patient for _, _, patient in earlier}
    known = [scan.likeness for scan in learned] + [likeness for _, likeness, _ in earlier]
    test = [report.scans[index] for index in split.test]
    of_patients = [scan.patient is not None and scan.patient in patients for scan in test]
    copies = [_is_copy(scan, contents) for scan in test]
    near = resembling([scan.likeness for scan in test], known)
    return np.array(of_patients, dtype=bool), np.array(copies, dtype=bool), near


def _is_copy(scan: ScanFile, contents: set[str]) -> bool:
    # All black pictures are one file; who has learned from one of them has learned nothing of the others' patients.
    return scan.likeness != "" and (scan.sha256 in contents or scan.sha256[:_DIGITS] in contents)


def _token(scan: ScanFile) -> str:
    return f"{scan.sha256[:_DIGITS]}.{scan.likeness or ''}.{scan.patient or ''}"


def _parts(token: str) -> tuple[str, str, str]:
    told = _TOKEN.fullmatch(token)
    if told is None:
        raise ModelFileError("The lineage of these weights is not one that RenalQ wrote.")
    return told.group(1), told.group(2), told.group(3)
