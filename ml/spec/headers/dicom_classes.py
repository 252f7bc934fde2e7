"""SOP classes that are no picture of a patient, by name (DICOM PS3.4 B.5, PS3.6 A). Everything else may be one.

A segmentation, a dose grid and a parametric map have rows, columns and pixels as well, so only the class tells them
from a scan.
"""

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_NO_PICTURES = {
    "1.2.840.10008.1.3.10": "directory (DICOMDIR)",
    "1.2.840.10008.5.1.4.39.": "colour palette",
    "1.2.840.10008.5.1.4.43.": "implant template",
    "1.2.840.10008.5.1.4.44.": "implant template",
    "1.2.840.10008.5.1.4.45.": "implant template",
    "1.2.840.10008.5.1.4.38.": "hanging protocol",
    "1.2.840.10008.5.1.4.34.": "treatment instruction or worklist",
    _STORAGE + "4.2": "MR spectroscopy",
    _STORAGE + "9.": "waveform",
    _STORAGE + "11.": "presentation state (PR)",
    _STORAGE + "30": "parametric map",
    _STORAGE + "66": "raw data object",
    _STORAGE + "66.1": "spatial registration (REG)",
    _STORAGE + "66.2": "spatial fiducials object",
    _STORAGE + "66.3": "deformable spatial registration (REG)",
    _STORAGE + "66.4": "segmentation (SEG)",
    _STORAGE + "66.5": "surface segmentation (SEG)",
    _STORAGE + "66.6": "tractography object",
    _STORAGE + "66.7": "label map segmentation (SEG)",
    _STORAGE + "66.8": "height map segmentation (SEG)",
    _STORAGE + "67": "real world value mapping",
    _STORAGE + "68.": "surface scan",
    _STORAGE + "77.1.5.3": "stereometric relationship",
    _STORAGE + "78.": "measurement of an eye",
    _STORAGE + "79.1": "macular grid report",
    _STORAGE + "80.1": "ophthalmic thickness report",
    _STORAGE + "88.": "structured report (SR)",
    _STORAGE + "90.1": "content assessment result",
    _STORAGE + "104.": "encapsulated document",
    _STORAGE + "104.1": "encapsulated PDF",
    _STORAGE + "104.2": "encapsulated CDA document",
    _STORAGE + "104.3": "encapsulated STL model",
    _STORAGE + "104.4": "encapsulated OBJ model",
    _STORAGE + "104.5": "encapsulated MTL material",
    _STORAGE + "131": "basic structured display",
    _STORAGE + "200.": "CT protocol",
    _STORAGE + "201.": "imaging agent administration report (SR)",
    _STORAGE + "481.": "radiotherapy object",
    _STORAGE + "481.2": "radiotherapy dose (RTDOSE)",
    _STORAGE + "481.3": "radiotherapy structure set (RTSTRUCT)",
    _STORAGE + "481.4": "radiotherapy treatment record",
    _STORAGE + "481.5": "radiotherapy plan (RTPLAN)",
    _STORAGE + "481.8": "radiotherapy ion plan (RTPLAN)",
}
"""By UID, or by its beginning where the key ends with a dot."""
_PICTURES = frozenset({_STORAGE + "481.1", _STORAGE + "481.23"})
"""RT Image and Enhanced RT Image."""


def refusal(sop_class: str) -> str | None:
    """What to tell about an object of a SOP class (its UID) that is no picture; None for one that may be a picture."""
    if sop_class in _PICTURES:
        return None
    root = next((name for name in _NO_PICTURES if name.endswith(".") and sop_class.startswith(name)), None)
    name = _NO_PICTURES.get(sop_class) or (_NO_PICTURES[root] if root else None)
    article = "an" if name and name[0] in "aeiou" else "a"
    return f"The DICOM file is {article} {name}, no picture: send the images that it belongs to." if name else None
