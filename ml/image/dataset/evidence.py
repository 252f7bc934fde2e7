"""Who is whose patient: all evidence of a dataset's scans, weighed together.

`patients.csv` overrules everything. Else PatientID counts, with its issuer where two issuers use one id. Study, Series
and FrameOfReference UIDs join scans further, also of different PatientIDs, but for UIDs that most patients share. Names
count where DICOM says nothing, and where all scans of a study agree on one: a name never divides what DICOM joins. What
is weighed ends as tokens: scans that share one stay together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ml.image.dataset.patient_list import Listed
from ml.image.dataset.patients import (
    folder_token,
    kinds_among,
    name_token,
    pseudonym,
    real_identity,
    real_uid,
    short_token,
)

if TYPE_CHECKING:
    from pydicom import Dataset

MANY_STUDIES = 5
"""From so many studies on, a PatientID that all scans of the dataset or of a class have in common is a placeholder."""
MOST_OWNERS = 0.5
"""Share of all PatientIDs: a UID of more of them was written into all files by some program, and tells nothing."""
LEAST_FOLDERS, LEAST_WORDS = 2, 5
"""So many folders in a class can be patients; the second is for folders without a digit, such as surnames."""
_DIGIT = re.compile(r"\d")
DICOM_TAGS = ("PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Evidence:
    """What one scan tells. `name`: its path below the class folder; the rest is DICOM's, None where it says nothing."""

    name: str
    identity: str | None = None
    issuer: str | None = None
    study: str | None = None
    series: str | None = None
    frame: str | None = None

    @property
    def uids(self) -> tuple[str, ...]:
        """All UIDs, each named by its kind."""
        named = (("study", self.study), ("series", self.series), ("frame", self.frame))
        return tuple(f"{kind} {uid}" for kind, uid in named if uid)


@dataclass(frozen=True)
class Belonging:
    """Pseudonyms of whom and what a scan belongs to, and `source`: what told the patient."""

    patient: str | None = None
    study: str | None = None
    links: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Weighed:
    """The belongings of all scans, in their order, and counts of scans whose evidence is doubtful."""

    belongings: tuple[Belonging, ...]
    common_identity: int = 0
    """PatientID is one value for many studies, so it is a placeholder."""
    shared_uids: int = 0
    """They have a UID that most patients have, so it tells nothing."""
    joined_identities: int = 0
    """They have a UID that scans with another PatientID have too, so the two patients stay together."""
    disagreeing: int = 0
    """Their names tell other patients than their PatientIDs."""


def read_evidence(name: str, dataset: Dataset) -> Evidence:
    """The evidence in a DICOM header. Values that cannot be read say nothing."""
    identity, issuer, *uids = (_text(dataset, tag) for tag in DICOM_TAGS)
    return Evidence(name, real_identity(identity), real_identity(issuer), *map(real_uid, uids))


def _text(dataset: Dataset, keyword: str) -> str | None:
    try:
        value = dataset.get(keyword)
    except Exception:  # a value that breaks its representation; pydicom raises all kinds
        return None
    return str(value) if isinstance(value, str) and value else None


def weigh(evidence: Sequence[Evidence], labels: Sequence[str], listed: Sequence[Listed | None]) -> Weighed:
    """Decide for each scan whom and what it belongs to. All arguments have one entry for each scan."""
    common = _common_identities(evidence, labels)
    identities = _identities(evidence, common)
    owners = _owners(evidence, identities)
    shared = {uid for uid, some in owners.items() if len(some) > max(1, MOST_OWNERS * len(set(identities) - {None}))}
    joining = {uid for uid, some in owners.items() if len(some) > 1} - shared
    told = _told_by_names([one.name for one in evidence], labels)
    agreed = _agreed_in_studies(evidence, told)
    belongings = tuple(
        _as_listed(row) if row else _belonging(one, identity, name, name.patient in agreed.get(_unit(one), ()), shared)
        for one, identity, name, row in zip(evidence, identities, told, listed, strict=True)
    )
    return Weighed(
        belongings,
        sum(one.identity in common for one in evidence),
        sum(not shared.isdisjoint(one.uids) for one in evidence),
        sum(not joining.isdisjoint(one.uids) for one in evidence),
        _disagreeing(evidence, identities),
    )


def _as_listed(row: Listed) -> Belonging:
    return Belonging(pseudonym(row.patient), row.study and pseudonym(f"study {row.study}"), (), "patients.csv")


def _belonging(one: Evidence, identity: str | None, told: _Told, agreed: bool, shared: set[str]) -> Belonging:
    uids = [uid for uid in one.uids if uid not in shared]
    study = next((pseudonym(uid) for uid in uids if uid.startswith("study")), None)
    links = tuple(pseudonym(uid) for uid in uids if not uid.startswith("study"))
    if identity:
        return Belonging(pseudonym(identity), study, links, "PatientID")
    if told.patient is None or (uids and not agreed):
        return Belonging(None, study, links)
    more = (pseudonym(f"folder {told.folder}"),) if told.folder else ()
    return Belonging(pseudonym(told.patient), study, links + more, "names")


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _common_identities(evidence: Sequence[Evidence], labels: Sequence[str]) -> set[str]:
    """All PatientIDs, if there are no more of them than classes, and each of them has many studies; else none."""
    studies: dict[str, set[str]] = {}
    for one in evidence:
        if one.identity:
            studies.setdefault(one.identity, set()).update([one.study] if one.study else [])
    are_common = len(studies) <= len(set(labels)) and all(len(some) >= MANY_STUDIES for some in studies.values())
    return set(studies) if are_common else set()


def _identities(evidence: Sequence[Evidence], common: set[str]) -> list[str | None]:
    """The PatientIDs, with their issuers where several issuers use one id and no file leaves its issuer open."""
    issuers: dict[str, set[str | None]] = {}
    for one in evidence:
        if one.identity:
            issuers.setdefault(one.identity, set()).add(one.issuer)
    return [
        None
        if one.identity is None or one.identity in common
        else f"{one.issuer}\0{one.identity}"
        if len(issuers[one.identity]) > 1 and None not in issuers[one.identity]
        else one.identity
        for one in evidence
    ]


def _owners(evidence: Sequence[Evidence], identities: Sequence[str | None]) -> dict[str, set[str]]:
    """The PatientIDs that scans with a UID have."""
    owners: dict[str, set[str]] = {}
    for one, identity in zip(evidence, identities, strict=True):
        for uid in one.uids if identity else ():
            owners.setdefault(uid, set()).add(identity or "")
    return owners


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What a path tells: the patient, and a folder that is one of a patient's as well, perhaps."""

    patient: str | None = None
    folder: str | None = None


def _told_by_names(names: Sequence[str], labels: Sequence[str]) -> list[_Told]:
    inner = _below_common_folders(names, labels)
    kinds = kinds_among(part for name in inner for part in name.split("/")[:-1])
    folders = _telling([folder_token(name, kinds) for name in inner], labels)
    numbered = _telling([folder_token(name, kinds, with_digit=True) for name in inner], labels)
    found = []
    for name, folder, with_digit in zip(names, folders, numbered, strict=True):
        token = name_token(name)
        if token is None:
            found.append(_Told(folder or short_token(name)))
        else:
            found.append(_Told(token, None if name_token(name.rpartition("/")[0]) else with_digit))
    return found


def _below_common_folders(names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Without the folders that hold all scans of their class, as long as each class has just one."""
    inner = list(names)
    while inner and all("/" in name for name in inner):
        first = {(label, name.partition("/")[0]) for label, name in zip(labels, inner, strict=True)}
        if len(first) > len(set(labels)) or any(name_token(folder) for _, folder in first):
            break
        inner = [name.partition("/")[2] for name in inner]
    return inner


def _telling(folders: list[str | None], labels: Sequence[str]) -> list[str | None]:
    """The folders that can be patients: if a class has several of them, and without a digit if it has five or more."""
    counts = Counter(label for label, folder in set(zip(labels, folders, strict=True)) if folder)
    if max(counts.values(), default=0) < LEAST_FOLDERS:
        return [None] * len(folders)
    return [
        folder if folder and (_DIGIT.search(folder) or counts[label] >= LEAST_WORDS) else None
        for label, folder in zip(labels, folders, strict=True)
    ]


def _unit(one: Evidence) -> str:
    """What joins scans by DICOM alone."""
    return one.uids[0] if one.uids else ""


def _agreed_in_studies(evidence: Sequence[Evidence], told: Sequence[_Told]) -> dict[str, tuple[str, ...]]:
    """The patient that all names in a study tell, by study; empty where they tell several or none."""
    found: dict[str, set[str | None]] = {}
    for one, name in zip(evidence, told, strict=True):
        found.setdefault(_unit(one), set()).add(name.patient)
    return {unit: tuple(name for name in some if name) if len(some) == 1 else () for unit, some in found.items()}


def _disagreeing(evidence: Sequence[Evidence], identities: Sequence[str | None]) -> int:
    """Scans whose names and PatientIDs do not tell patients apart in the same way."""
    pairs = [(name_token(one.name), identity) for one, identity in zip(evidence, identities, strict=True)]
    both = {pair for pair in pairs if None not in pair}
    of_name, of_identity = Counter(name for name, _ in both), Counter(identity for _, identity in both)
    return sum(pair in both and max(of_name[pair[0]], of_identity[pair[1]]) > 1 for pair in pairs)
