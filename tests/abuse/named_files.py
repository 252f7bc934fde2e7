"""Files that name their patient, CANARY, wherever a file can, and whose names and contents no program expects."""

import gzip
import struct
from typing import Any

import numpy as np

from tests.api.conftest import png, zipped
from tests.ml.raw_dicom import raw_dicom
from tests.worker.test_studies import VALUES

CANARY = "CANARY4711"
LONG_NAME = CANARY * 40
"""Longer than a disk takes."""


def with_names(names: list[bytes], content: bytes) -> bytes:
    """A zip whose members have these bytes as names, without a note of their encoding."""
    stand_ins = [
        f"{number:03}".encode() * (len(name) // 3) + b"x" * (len(name) % 3) for number, name in enumerate(names)
    ]
    packed = zipped({name.decode(): content for name in stand_ins}, compress=False)
    for stand_in, name in zip(stand_ins, names, strict=True):
        packed = packed.replace(stand_in, name)
    return packed


def damaged(packed: bytes) -> bytes:
    """With another byte in its first member's content."""
    at = packed.index(b"IDAT") + 6
    return packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :]


def nifti(description: bytes, kind: int = 16) -> bytes:
    """A volume with this description; `kind`: NIfTI's number of the type of its values."""
    head = bytearray(348)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, 8, 8, 2, 1, 1, 1, 1)
    struct.pack_into("<2h", head, 70, kind, 32)
    struct.pack_into("<8f", head, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into("<f", head, 108, 352)
    head[148 : 148 + len(description)] = description
    head[344:348] = b"n+1\0"
    return bytes(head) + bytes(4) + np.arange(128, dtype="<f4").tobytes()


LATIN = CANARY.encode() + b"\xff"
HEADERS: dict[str, dict[str, Any]] = {
    "UIDs that are none": {"StudyInstanceUID": f"{CANARY}..1", "SOPInstanceUID": "1." * 60 + CANARY},
    "an unknown charset": {"SpecificCharacterSet": f"ISO_IR {CANARY}", "PatientName": CANARY},
    "a charset that it is not in": {"SpecificCharacterSet": "ISO_IR 192", "PatientName": LATIN},
    "numbers that are none": {"SliceThickness": CANARY, "PixelSpacing": f"{CANARY}\\1", "InstanceNumber": CANARY},
    "dates that are none": {"StudyDate": CANARY, "PatientAge": CANARY, "PatientBirthDate": CANARY},
    "a window that is none": {"WindowCenter": CANARY, "WindowWidth": CANARY},
    "pixels that are missing": {"PatientName": CANARY, "PixelData": b"\0\0"},
    "long values": {"PatientName": LONG_NAME, "PatientID": LONG_NAME, "Modality": LONG_NAME[:200]},
}  # fmt: skip
SCANS = {
    **{f"{what}.dcm": raw_dicom(VALUES, **fields) for what, fields in HEADERS.items()},
    "unknown syntax.dcm": raw_dicom(VALUES, "1.2.3.4", PatientName=CANARY),
    "text.png": b"\x89PNG\r\n\x1a\n" + CANARY.encode(),
    "comment.png": png()[:-12] + struct.pack(">I", 14) + b"tEXtA\0" + CANARY.encode() + b"xx" + bytes(4) + png()[-12:],
    "volume.nii": nifti(CANARY.encode()),
    "strange.nii": nifti(CANARY.encode(), kind=4711),
    "cut.nii": nifti(CANARY.encode())[:400],
    "packed.nii.gz": gzip.compress(CANARY.encode()),
}  # fmt: skip
PNG = png(shade=7)
DATASETS = {
    "long names": zipped({f"Normal/{LONG_NAME}.png": PNG, f"Tumor/{LONG_NAME}.png": PNG}),
    "a long folder": zipped({f"{LONG_NAME}/1.png": PNG}),
    "a file and a folder of one name": zipped([(f"Normal/{CANARY}", PNG), (f"Normal/{CANARY}/1.png", PNG)]),
    "names that are not UTF-8": with_names([b"Normal/" + CANARY.encode() + b"\xff\xfe.png"], PNG),
    "surrogates": with_names([b"Normal/" + CANARY.encode() + b"\xed\xa0\x80.png"], PNG),
    "a NUL and lines": zipped({f"Normal/{CANARY}\r\n\x1b[31m.png": PNG, f"Tumor/{CANARY}\u202e.png": PNG}),
    "dots": zipped({f"../{CANARY}.png": PNG}),
    "the same twice": zipped([(f"Normal/{CANARY}.png", PNG), (f"Normal/{CANARY}.png", PNG)]),
    "a damaged member": damaged(zipped({f"Normal/{CANARY}.png": PNG, "Tumor/1.png": PNG}, compress=False)),
    "a zip in the zip": zipped({f"{CANARY}.zip": zipped({CANARY: PNG})}),
    "a damaged directory": zipped({f"Normal/{CANARY}.png": PNG})[:-30],
    "all scans": zipped({f"{kind}/{CANARY} {name}": SCANS[name] for kind in ("Normal", "Tumor") for name in SCANS}),
    "patients": zipped({"patients.csv": f"file,patient\n{CANARY},{CANARY}\n".encode(), f"Normal/{CANARY}.png": PNG}),
}  # fmt: skip
MANIFESTS = {
    "of files that are missing": f"file,custom_id\n{CANARY}.png,{CANARY}\n",
    "of addresses": f"url,custom_id,patient\nhttp://127.0.0.1:{{port}}/{CANARY}.dcm?token={CANARY},{CANARY},{CANARY}\n",
    "of wrong ids": f"scan_id\n{CANARY}\n",
    "not CSV": f'file\n"{CANARY}',
    "not JSON": f'{{"file": "{CANARY}',
    "of unknown columns": f"{CANARY}\n1\n",
}
