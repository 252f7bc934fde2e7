"""The patient of a scan, from its path below the class folder or from DICOM; kept as a hash only.

The hash is a pseudonym, not an anonymization: anyone with the list of patient numbers can hash them too. Protect
manifests and lineages like the scans' file names.
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
_PLACEHOLDER = re.compile(
    r"[0\W_]*|anon(ymous|ymi[sz]ed)?\W*|unknown|none|null|nil|n/?a|no ?id|removed|de-?identified|x+", re.IGNORECASE
)


def patient_of(name: str, identity: str | None) -> str | None:
    """A pseudonym of 16 hex digits for the patient of a scan; None if the patient is unknown.

    Args:
        name: path below the class folder. A patient id is a word and a number between separators (`patient_12`,
            `P0012`, `case-3/slice.png`, `sub-01`) or a TCGA or CPTAC barcode; a bare number, `Tumor- (12)` or
            `image(12)` is none.
        identity: DICOM's PatientID, used if the name has no id; placeholders such as "anonymous" are ignored.
    """
    patient = _from_name(name) or _from_dicom(identity)
    return hashlib.sha256(patient.encode()).hexdigest()[:16] if patient else None


def _from_name(name: str) -> str | None:
    if barcode := _BARCODE.search(name):
        return barcode.group(1).upper()
    number = _NUMBER.search(name)
    return _WORDS[number.group(1).lower()] + number.group(2) if number else None


def _from_dicom(identity: str | None) -> str | None:
    # If a placeholder counted as a patient, all scans would be of one patient and could not be split.
    patient = (identity or "").strip()
    return None if _PLACEHOLDER.fullmatch(patient) else patient
