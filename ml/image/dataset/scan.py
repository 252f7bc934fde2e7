"""`ScanFile`: what the dataset check found out about one scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ScanFile:
    """One scan of a dataset. The fields after `patient` keep their defaults if the scan could not be read."""

    path: str
    """POSIX path relative to the dataset's folder."""
    label: str
    sha256: str
    """Hex digest of the file's bytes."""
    patient: str | None
    """A hash of the patient id, never the id itself; None if the patient is unknown."""
    perceptual_hash: str | None = None
    """See `ml.image.dataset.perceptual_hash`; "" for a blank scan. Manifests keep it under the key `likeness`."""
    height: int = 0
    width: int = 0
    mode: str = ""
    modality: str | None = None
    """DICOM modality, such as CT; None for other files."""

    def as_json(self) -> dict[str, Any]:
        """The entry of a manifest."""
        fields = asdict(self)
        return {("likeness" if name == "perceptual_hash" else name): value for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ScanFile:
        """The inverse of `as_json`. TypeError for unknown or missing fields."""
        return cls(**{("perceptual_hash" if name == "likeness" else name): value for name, value in fields.items()})
