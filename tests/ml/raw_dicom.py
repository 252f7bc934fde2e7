"""DICOM files written byte by byte, so that they can hold what pydicom would not write: text that is no number, empty
elements, a missing header."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VR, tag_for_keyword

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
EXPLICIT, IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
LONG = ("OB", "OW", "OF", "OD", "SQ", "UN", "UT")
Fields = dict[str, Any]


def raw_dicom(values: np.ndarray, syntax: str = EXPLICIT, part10: bool = True, **fields: Any) -> bytes:
    """A file of stored values [rows, columns] or [frames, rows, columns]: CT without rescale and window.

    `fields`: by keyword, text, a number, bytes, or a list of such fields for a sequence; None leaves a field out.
    `part10`: with preamble and meta header.
    """
    bits, order = 8 * values.itemsize, ">" if syntax == BIG_ENDIAN else "<"
    all_fields: Fields = {
        "SOPClassUID": CT, "SOPInstanceUID": "1.2.3.4", "Modality": "CT", "PatientID": "SECRET-77",
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": bits, "BitsStored": bits,
        "PixelRepresentation": int(values.dtype.kind == "i"), "Rows": values.shape[-2], "Columns": values.shape[-1],
        "NumberOfFrames": str(len(values)) if values.ndim == 3 else None,
        "PixelData": values.astype(values.dtype.newbyteorder(order)).tobytes(),
    } | fields  # fmt: skip
    if all_fields["BitsStored"] is not None:
        all_fields.setdefault("HighBit", all_fields["BitsStored"] - 1)
    body = _data_set(all_fields, syntax)
    if not part10:
        return body
    meta = _data_set({"MediaStorageSOPClassUID": all_fields["SOPClassUID"], "TransferSyntaxUID": syntax}, EXPLICIT)
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + body


def _data_set(fields: Fields, syntax: str) -> bytes:
    known = {keyword: value for keyword, value in fields.items() if value is not None}
    ordered = sorted(known, key=lambda keyword: tag_for_keyword(keyword) or 0)
    return b"".join(_element(keyword, known[keyword], known, syntax) for keyword in ordered)


def _element(keyword: str, value: Any, fields: Fields, syntax: str) -> bytes:
    order, tag = ">" if syntax == BIG_ENDIAN else "<", tag_for_keyword(keyword) or 0
    kind = dictionary_VR(tag)
    if kind == "US or SS":
        kind = "SS" if isinstance(value, int) and value < 0 else "US"
    kind = "OW" if kind.startswith(("OB", "US or OW")) else kind
    data = _value(value, kind, order, syntax)
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if syntax == IMPLICIT:
        return head + struct.pack("<I", len(data)) + data
    if kind in LONG:
        return head + kind.encode() + b"\0\0" + struct.pack(f"{order}I", len(data)) + data
    return head + kind.encode() + struct.pack(f"{order}H", len(data)) + data


def _value(value: Any, kind: str, order: str, syntax: str) -> bytes:
    if kind == "SQ":
        items = (_data_set(item, syntax) for item in value)
        return b"".join(struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    if isinstance(value, (int, list)):
        form = {"US": "H", "SS": "h", "OW": "H"}[kind]
        numbers = [value] if isinstance(value, int) else value
        return b"".join(struct.pack(order + ("h" if number < 0 else form), number) for number in numbers)
    data: bytes = value if isinstance(value, bytes) else value.encode()
    return data + (b"\0" if kind in ("UI", "OW") else b" ") * (len(data) % 2)
