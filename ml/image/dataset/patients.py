"""The patient that names tell, and what a PatientID is worth. Kept as hashes only.

A hash is a pseudonym, not an anonymization: anyone with the list of patient numbers can hash them too. Protect
manifests and lineages like the scans' file names.

The rules for names, of which the first that applies counts:
1. a word for a patient and a number, or the code of a public dataset, in a folder or in the file's name, folders first;
2. the first folder below the class that is not named after a kind of pictures (`axial`, `batch_2`, but for ten or more
   with numbers), if a class has several; folders without a digit may as well be of subtypes (`papillary`), and count
   from five in a class on;
3. `P0012` or `s0012` at the start of the file's name: `p` with three digits or more, `s` with four or more.
Numbers by themselves, and `p1` to `p99`, count pages, phases and slices as often as patients, so they never count.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from ml.runtime.pseudonyms import pseudonym as pseudonym

_WORDS = {
    "patient": "",
    "pat": "",
    "case": "case ",
    "subject": "subject ",
    "subj": "subject ",
    "sub": "subject ",
    "volume": "volume ",
    "vol": "volume ",
}
_START, _END = r"(?:^|[/_\-. ])", r"(?=[/_\-. ]|$)"
_WORD = "|".join(_WORDS).replace("|sub|", r"|(?<![_\-. ])sub|")  # elsewhere than at the start: a part of a picture
_NUMBER = re.compile(f"{_START}({_WORD})" + r"(?:[_\- ]?id)?[_\- ]?(\d+)" + _END, re.IGNORECASE)
_CODES = (
    r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}",
    r"C3[LN]-[0-9]{5}",  # CPTAC
    r"LIDC-IDRI-[0-9]{4}",
    r"LUNG[12]-[0-9]{3}",
    r"UPENN-GBM-[0-9]{5}",
    r"BraTS(?:20)?[0-9]{0,2}(?:[-_][A-Z]+)*[-_][0-9]+",
    r"OAS[123]_?[0-9]{4,5}",  # OASIS
    r"[0-9]{3}_S_[0-9]{4}",  # ADNI
    r"CQ500-?CT-?[0-9]+",
)
_CODE = re.compile(f"{_START}({'|'.join(_CODES)}){_END}", re.IGNORECASE)
_SHORT = re.compile(r"(p(?=[0-9]{3})|s(?=[0-9]{4}))([0-9]+)" + _END, re.IGNORECASE)
_SHORT_WORDS = {"p": "", "s": "s "}
_KINDS = re.compile(
    # Kinds of pictures; and parts of a dataset, which may be numbered.
    r"(?:image|img|pic|picture|photo|scan|slice|frame|file|data|dataset|dicom|dcm|png|jpe?g|tiff?|raw|original|processed"
    r"|cropped|resized|augmented|ct|cta|mri?|pet|us|x-?ray|flair|adc|dwi|axial|coronal|sagittal|left|right|male|female"
    r"|contrast|arterial|venous|delayed|plain|anat|baseline|follow[-_ ]?up|new folder|unknown|misc|other"
    r"|t[12](?:w|ce?|gd)?)s?"
    r"|(?:part|batch|set|fold|group|site|cent(?:er|re)|hospital|scanner|export|ses(?:sion)?|visit|day"
    r"|week|month|grade|stage|type|level|category|phase)[-_ ]?\(?[0-9a-z]{0,3}\)?",
    re.IGNORECASE,
)
MANY_SIBLINGS = 10  # folders that differ by a number alone
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:[-_.]?[0-9]{2}){0,2}")
_PLACEHOLDER = re.compile(
    r"[0\W_]*|anon(ymous|ymi[sz]ed)?\W*|unknown|none|null|nil|n/?a|no ?(id|name)|removed|hidden|confidential|dummy"
    r"|de-?identified|pseudonymi[sz]ed|test|x+|1234567(89?0?)?|(anonymous|test|unknown)?[ _^]?patient[ _^]?(id|name)?",
    re.IGNORECASE,
)


def patient_of(name: str, identity: str | None) -> str | None:
    """A pseudonym of 16 hex digits for the patient of one scan by itself; None if the patient is unknown.

    Args:
        name: path below the class folder; see rules 1 and 3 above. Rule 2 needs to know the other files.
        identity: DICOM's PatientID, which counts more; placeholders such as "anonymous" are ignored.
    """
    patient = real_identity(identity) or name_token(name) or short_token(name)
    return pseudonym(patient) if patient else None


def real_identity(identity: str | None) -> str | None:
    """A PatientID without padding; None for placeholders.

    If a placeholder counted as a patient, all scans would be of one patient and could not be split.
    """
    patient = (identity or "").strip(" \0\t\r\n")
    return None if _PLACEHOLDER.fullmatch(patient) else patient


def real_uid(uid: str | None) -> str | None:
    """A UID; None for placeholders, and for those that DICOM itself defines, such as the space of an atlas."""
    found = real_identity(uid)
    return None if found is None or found.startswith("1.2.840.10008.") else found


def name_token(name: str) -> str | None:
    """The patient by rule 1: text that is the same for all scans of the patient, such as `case 12`."""
    if code := _CODE.search(name):
        return code.group(1).upper()
    number = _NUMBER.search(name)
    return _WORDS[number.group(1).lower()] + number.group(2) if number else None


def short_token(name: str) -> str | None:
    """The patient by rule 3, from the last part of a path."""
    short = _SHORT.match(name.rpartition("/")[2])
    return _SHORT_WORDS[short.group(1).lower()] + short.group(2) if short else None


def kinds_among(folders: Iterable[str]) -> set[str]:
    """Those of a dataset's folders that are named after a kind of pictures, or a part of the dataset.

    Not those with many siblings, nor with siblings that are none: `T1` is a kind beside `T2`, and a patient beside
    `T3`; `batch_1` to `batch_20` may be anything.
    """
    siblings: dict[str, set[str]] = {}
    for folder in folders:
        siblings.setdefault(re.sub(r"\d+", "#", folder.lower()), set()).add(folder)
    few = (some for some in siblings.values() if len(some) < MANY_SIBLINGS and all(map(is_kind, some)))
    return {folder for some in few for folder in some}


def folder_token(name: str, kinds: Container[str], with_digit: bool = False) -> str | None:
    """The patient by rule 2; the same text as rules 1 and 3 find in the folder's name.

    `kinds`: folders that are none (`kinds_among`). `with_digit`: only a folder whose name has a digit and is no date.
    """
    for part in name.split("/")[:-1]:
        if part in kinds or (with_digit and (_DATE.fullmatch(part) or not re.search(r"\d", part))):
            continue
        return name_token(part) or short_token(part) or part
    return None


def is_kind(folder: str) -> bool:
    """Whether a folder is named after a kind of pictures, or a part of a dataset."""
    return bool(_KINDS.fullmatch(folder))


def names_patient(folder: str) -> bool:
    """Whether a folder is named after a patient by rules 1 and 3."""
    return bool(name_token(folder) or short_token(folder))
