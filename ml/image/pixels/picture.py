"""`Picture`: decoded pixels, and what the file says of them. `Origin`: what a model may remember of its scans."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image

BLANK = 2.0
"""Grey levels between the darkest and the brightest of 32 × 32 cells, below which a picture shows nothing."""
_CELLS = (32, 32)
GREY = "grey"
"""The kind of a picture of one channel."""


@dataclass(frozen=True)
class Origin:
    """Where a picture comes from. It holds no free text, so it may be stored and shown.

    `modality`: DICOM modality, such as CT. `body_part`: a defined term of PS3.16 annex L, such as ABDOMEN. Both are
    "other" for anything else that a file says, and None where it says nothing or is no DICOM. `kind`: grey, palette or
    colour, as the file stores it.
    """

    modality: str | None = None
    body_part: str | None = None
    kind: str = GREY


@dataclass(frozen=True, repr=False)
class Identity:
    """Whose slice it is and where it lies, as the file says; None where it says nothing.

    It names a person, so it stands in no log and no message, and has no `repr`. `instance_number` as DICOM counts, from
    1. `position_mm`: along the normal of the slices, in mm; slices of one series follow each other by it.
    """

    study_uid: str | None = None
    series_uid: str | None = None
    sop_uid: str | None = None
    instance_number: int | None = None
    accession: str | None = None
    patient: str | None = None
    position_mm: float | None = None


def foreign(origin: Origin, learnt: Collection[Origin]) -> str | None:
    """Why a picture is not of the kind that a network has learnt from, or None.

    By the modality, which DICOM demands of every object, and by colour. Files that say no modality, such as PNG, are
    foreign to nobody. A network that learnt from such files alone knows of no
    modality. The body part is no reason: it is optional, and often that of the protocol rather than of the picture.
    """
    if not origin.modality:
        return None
    known = sorted({each.modality for each in learnt if each.modality})
    if known and origin.modality not in known:
        return f"its modality is {origin.modality}, and the network has learnt from {', '.join(known)}"
    if origin.kind != GREY and {each.kind for each in learnt} == {GREY}:
        return "it is in colour, and the network has learnt from grey scans alone"
    return None


@dataclass(frozen=True)
class Window:
    """A window: centre and width in the units of the modality, and its function (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    centre: float
    width: float
    function: str = "LINEAR"


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded slice.

    `pixels`: uint8 [height, width, 3], RGB. `frame` of `frames`: which one of a file with several frames or pages,
    counted from 0. `spacing_mm`: (between rows, between columns), where the file says. `window`: the window that it was
    shown with; None for LUTs, for ranges and for what is shown as it is. `identity`: whose it is.
    """

    pixels: np.ndarray
    origin: Origin = Origin()
    frame: int = 0
    frames: int = 1
    spacing_mm: tuple[float, float] | None = None
    window: Window | None = None
    identity: Identity = Identity()


def is_blank(pixels: np.ndarray) -> bool:
    """Whether a picture, uint8 [height, width, 3], shows nothing but one grey level.

    By the means of 32 × 32 cells, so that neither noise of a grey level nor a hot pixel counts as anatomy.
    """
    grey = Image.fromarray(pixels).convert("L").convert("F")
    return float(np.ptp(np.asarray(grey.resize(_CELLS, Image.Resampling.BOX)))) < BLANK
