"""`ScanFile`: what the dataset check found out about one scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ml.image.pixels.picture import Origin


@dataclass(frozen=True)
class ScanFile:
    """One scan of a dataset. Perceptual hash, sides, mode and modality keep their defaults if it could not be read."""

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
    body_part: str | None = None
    """DICOM body part, such as KIDNEY; None for other files."""
    kind: str = ""
    """How the file stores its pixels: grey, palette or colour (`ml.image.pixels.picture.Origin`)."""
    window: tuple[float, float] | None = None
    """Centre and width that it was shown with; None for ranges, tables and what is shown as it is."""
    study: str | None = None
    """A hash of the StudyInstanceUID, or of the study in patients.csv."""
    links: tuple[str, ...] = ()
    """Hashes of what else scans of one patient share: series, space (FrameOfReferenceUID), folder."""
    side: str | None = None
    """train, validation or test, if a folder or patients.csv says so."""
    source: str | None = None
    """What told the patient: patients.csv, PatientID or names."""
    traits: dict[str, str] = field(default_factory=dict)
    """What subgroups are made of; see `ml.image.dataset.traits`."""

    @property
    def origin(self) -> Origin:
        """Where it comes from, as a model remembers it."""
        return Origin(self.modality, self.body_part, self.kind)

    def as_json(self) -> dict[str, Any]:
        """The entry of a manifest."""
        fields = asdict(self)
        return {("likeness" if name == "perceptual_hash" else name): value for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ScanFile:
        """The inverse of `as_json`. TypeError for unknown or missing fields."""
        values = {("perceptual_hash" if name == "likeness" else name): value for name, value in fields.items()}
        window = values.get("window")
        return cls(**{**values, "links": tuple(values.get("links", ())), "window": window and tuple(window)})
