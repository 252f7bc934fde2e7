"""Which patient a scan is of: told by the names below the class folder or by DICOM, and kept as a hash only.

The hash is a pseudonym, not an anonymization: who has the list of all patient numbers can hash them too. So manifests
and lineages are to be guarded like the scans' file names.
"""

from __future__ import annotations

import hashlib
import re

_WORDS = {
    "patient": "",
    "pat": "",
    "p": "",
    "case": "case ",
    "subject": "subject ",
    "subj": "subject ",
    "sub": "subject ",
}
_START, _END = r"(?:^|[/_\-. ])", r"(?=[/_\-. ]|$)"
_NUMBER = re.compile(f"{_START}({'|'.join(_WORDS)})" + r"(?:[_\- ]?id)?[_\- ]?(\d+)" + _END, re.IGNORECASE)
_BARCODE = re.compile(f"{_START}(TCGA-[A-Z0-9]{{2}}-[A-Z0-9]{{4}}|C3[LN]-[0-9]{{5}}){_END}", re.IGNORECASE)
_NOBODY = re.compile(
    r"[0\W_]*|anon(ymous|ymi[sz]ed)?\W*|unknown|none|null|nil|n/?a|no ?id|removed|de-?identified|x+", re.IGNORECASE
)


def patient_of(name: str, identity: str | None) -> str | None:
    """16 hex digits for the patient of a scan; None where nothing tells it.

    `name`: the path below the class folder. A patient is a word and a number between separators (`patient_12`, `P0012`,
    `case-3/slice.png`, `sub-01`) or a barcode of TCGA or CPTAC; a bare number, `Tumor- (12)` or `image(12)` is none.
    `identity`: DICOM's PatientID, used where the name tells nothing; what stands for "removed" is nobody's.
    """
    told = _told_by(name) or _somebody(identity)
    return hashlib.sha256(told.encode()).hexdigest()[:16] if told else None


def _told_by(name: str) -> str | None:
    if barcode := _BARCODE.search(name):
        return barcode.group(1).upper()
    number = _NUMBER.search(name)
    return _WORDS[number.group(1).lower()] + number.group(2) if number else None


def _somebody(identity: str | None) -> str | None:
    # One placeholder for all would make all scans one patient's, and no split would be possible.
    told = (identity or "").strip()
    return None if _NOBODY.fullmatch(told) else told
