"""One scan of a dataset, as its check found it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanFile:
    """One scan of a dataset. What follows `patient` has its default where the scan could not be read."""

    path: str
    """Relative to the dataset's folder."""
    label: str
    sha256: str
    """Of the file's bytes."""
    patient: str | None
    """A hash, never the id itself; None where nothing tells the patient."""
    likeness: str | None = None
    """The descriptor of `ml.image.dataset.perceptual_hash`, by which near-duplicates are found; "" for a blank scan."""
    height: int = 0
    width: int = 0
    mode: str = ""
    modality: str | None = None
    """DICOM's, such as CT."""
