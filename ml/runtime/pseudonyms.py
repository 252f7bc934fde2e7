"""Pseudonyms of patients, the same wherever a patient is named: in lineages, manifests and results."""

import hashlib


def pseudonym(text: str) -> str:
    """16 hex digits. A pseudonym is no anonymization: whoever has the list of patient numbers can hash them too."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
