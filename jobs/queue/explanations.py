"""Explanations of a prediction's results. A batch has separate units for them, behind those that predict, so that no
result waits; a single scan is explained in the unit that predicts it.

An explanation consists of artifacts named by the scan's ordinal: an overlay, a heatmap, and a note if the heatmap is
zero everywhere. An explaining unit writes them one by one: if it is interrupted, they stay, and the next attempt does
the rest.
"""

import mimetypes
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import any_, func, insert, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlalchemy.types import String

from jobs.db import NOW
from jobs.queue.leases import Claim, add_unit, update_held
from jobs.states import ResultState
from jobs.storage.blobs import Blob
from jobs.tables import Artifact, Job, Scan, ScanResult, Unit
from ml.spec.pipeline import BLANK_NOTE, HEATMAP, OVERLAY

FOLDER = "explanations/"
ALL_CLASSES = "all"
"""Value of a job's parameter `explain`: explain every class of the model, not only the predicted one."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST = 60


def artifact_name(ordinal: int, part: str = OVERLAY, slug: str | None = None) -> str:
    """The artifact's name; names sort like their scans. `slug`: of a class other than the predicted one."""
    return f"{FOLDER}{ordinal:06}{'' if slug is None else f'.{slug}'}{part}"


def class_slugs(classes: Iterable[str]) -> dict[str, str]:
    """A distinct slug for each class, for names of artifacts (case-insensitive)."""
    slugs: dict[str, str] = {}
    taken = {"heatmap"}  # 000000.heatmap.png is the heatmap of the predicted class
    for number, label in enumerate(classes):
        slug = _UNSAFE.sub("_", label)[:_LONGEST]
        while slug.casefold() in taken:
            slug += f"-{number}"
        taken.add(slug.casefold())
        slugs[label] = slug
    return slugs


def enqueue(session: Session, claim: Claim) -> int | None:
    """Append a unit that explains the results of this one, if it has any and its job was not cancelled. The job's row
    must be locked. Returns the new unit's ordinal."""
    goes_on = select(Job.id).where(Job.id == claim.job_id, Job.cancel_requested_at.is_(None)).exists()
    results = ScanResult.unit_id == claim.unit_id, ScanResult.state == ResultState.SUCCEEDED
    found = session.scalar(select(func.count()).select_from(ScanResult).where(*results, goes_on))
    return add_unit(session, claim, scans=found, explains=claim.unit_id)[1] if found else None


@dataclass(frozen=True)
class Unexplained:
    """A result without an explanation. Its scan is stored under `sha256`, or fetched from `source_url`. `frame`: which
    of the file's frames it is of; None: the whole file."""

    ordinal: int
    sha256: str | None
    source_url: str | None
    label: str
    frame: int | None = None


def unexplained(session: Session, claim: Claim) -> list[Unexplained]:
    """The results that an explaining unit has left, in order."""
    of = select(Unit.explains).where(Unit.id == claim.unit_id).scalar_subquery()
    rows = session.execute(
        select(ScanResult.ordinal, Scan.sha256, ScanResult.source_url, ScanResult.label, ScanResult.frame)
        .join(Scan, Scan.id == ScanResult.scan_id, isouter=True)
        .where(ScanResult.unit_id == of, ScanResult.state == ResultState.SUCCEEDED)
        .order_by(ScanResult.ordinal)
    ).all()
    done = find_files(session, claim.job_id, [row.ordinal for row in rows])
    left = [row for row in rows if row.ordinal not in done]
    return [Unexplained(row.ordinal, row.sha256, row.source_url, row.label or "", row.frame) for row in left]


NamedBlob = tuple[str, Blob]
"""An artifact's name and content."""


def save(session: Session, claim: Claim, made: Iterable[NamedBlob]) -> None:
    """Store explanations. Pass all files of a scan at once, so that none is stored in part.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    update_held(session, claim, progress_at=NOW)
    insert_artifacts(session, claim, made)


def insert_artifacts(session: Session, claim: Claim, made: Iterable[NamedBlob]) -> None:
    """As `save`, in the transaction that has finished the unit under its fence."""
    rows = [
        {
            "job_id": claim.job_id,
            "tenant_id": claim.tenant_id,
            "name": name,
            "sha256": blob.sha256,
            "size": blob.size,
            "media_type": mimetypes.guess_type(name)[0] or "application/octet-stream",
        }
        for name, blob in made
    ]
    if rows:
        session.execute(insert(Artifact), rows)


@dataclass(frozen=True)
class ExplanationFiles:
    """A scan's artifacts for one class. `heatmap`: None in jobs of older releases; `is_blank`: it is 0 everywhere."""

    overlay: str
    heatmap: str | None
    is_blank: bool


def find_files(
    session: Session, job_id: uuid.UUID, ordinals: Sequence[int], slugs: Mapping[str, str] | None = None
) -> dict[int, dict[str | None, ExplanationFiles]]:
    """The stored explanations of these scans, for the predicted class (None) and the classes in `slugs`."""
    of_class: dict[str | None, str | None] = {None: None} | dict(slugs or {})
    parts = (OVERLAY, HEATMAP, BLANK_NOTE)
    names = [artifact_name(ordinal, part, slug) for ordinal in ordinals for slug in of_class.values() for part in parts]
    wanted = any_(literal(names, ARRAY(String)))
    here = set(session.scalars(select(Artifact.name).where(Artifact.job_id == job_id, Artifact.name == wanted)))
    explained: dict[int, dict[str | None, ExplanationFiles]] = {}
    for ordinal in ordinals:
        for label, slug in of_class.items():
            overlay, heatmap, blank = (artifact_name(ordinal, part, slug) for part in parts)
            if overlay in here:
                seen = ExplanationFiles(overlay, heatmap if heatmap in here else None, blank in here)
                explained.setdefault(ordinal, {})[label] = seen
    return explained
