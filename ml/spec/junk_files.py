"""Files that lie beside items and are none: what systems and programs leave behind, and what describes a dataset.

By name alone, at every depth, the same for a dataset and for a batch. Whether any other file is an item is decided by
its content.
"""

from __future__ import annotations

import re

PATIENT_LIST = "patients.csv"
"""In a dataset's zip: path, patient, and optionally study, label and split of each scan."""
_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "icon%0d", "dicomdir"))
_DOCUMENT = re.compile(
    r"(?:read[-_ ]?me|licen[cs]es?|copying|copyright|version|change(?:s|log)|notice|authors|citation|"
    r"(?:md5|sha1|sha256|sha512|check)sums?)(?:[-_. ][^/]*)?",
    re.IGNORECASE,
)
_TEXT = re.compile(r"[^.]*|.*\.(?:txt|md|markdown|rst|html?|pdf|rtf|docx?|cff|bib|\d+)", re.IGNORECASE)


def is_junk(name: str) -> bool:
    """Whether a file passed over by its path (forward slashes): hidden, in a folder that a system made, or a document.

    Hidden is what begins with a dot, such as `.DS_Store`, `._a.png`, `.Trash-1000/` and `.ipynb_checkpoints/`.
    Documents are LICENSE, VERSION, README and their like without a suffix, or with that of a text.
    """
    *folders, file = name.split("/")
    if any(part.startswith(".") or part.lower() in _FOLDERS for part in (*folders, file)):
        return True
    return file.lower() in _FILES or bool(_DOCUMENT.fullmatch(file) and _TEXT.fullmatch(file))
