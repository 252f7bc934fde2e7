"""Explanations of a prediction's results: of a batch in units of their own behind those that predict, so that no result
waits; of a single scan in the unit that predicts it.

An explanation is some artifacts of its job, named by its scan's ordinal: an overlay, a heatmap, and a note where
nothing in the scan speaks for the class. An explaining unit writes each as it comes: what is written when it is
interrupted or lost stays, and the next attempt does the rest.
"""

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import any_, func, insert, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlalchemy.types import String

from jobs.db import NOW
from jobs.queue.leases import Claim, add_unit, require_held
from jobs.states import ResultState
from jobs.storage.blobs import Blob
from jobs.tables import Artifact, Scan, ScanResult, Unit

FOLDER = "explanations/"
ALL = "all"
"""As a job's parameter `explain`: every class of the model, not only the one that was found."""
OVERLAY, HEATMAP, BLANK = ".png", ".heatmap.png", ".blank.txt"
MEDIA_TYPES = {".png": "image/png", ".txt": "text/plain"}
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST = 60


def name_of(ordinal: int, part: str = OVERLAY, word: str | None = None) -> str:
    """The artifact's name; names are ordered as their scans are. `word`: of a class that was not found."""
    return f"{FOLDER}{ordinal:06}{'' if word is None else f'.{word}'}{part}"


def words_of(classes: Iterable[str]) -> dict[str, str]:
    """Each class as a word for artifacts' names, no two of them alike."""
    words: dict[str, str] = {}
    taken = {"heatmap"}  # 000000.heatmap.png is another thing's name
    for number, label in enumerate(classes):
        word = _UNSAFE.sub("_", label)[:_LONGEST]
        while word.casefold() in taken:
            word += f"-{number}"
        taken.add(word.casefold())
        words[label] = word
    return words


def follow(session: Session, held: Claim) -> None:
    """Let a unit follow that explains what this one has found, if it has found anything. With the job's row locked."""
    found = session.scalar(
        select(func.count()).where(ScanResult.unit_id == held.unit_id, ScanResult.state == ResultState.SUCCEEDED)
    )
    if found:
        add_unit(session, held, scans=found, explains=held.unit_id)


@dataclass(frozen=True)
class Unexplained:
    """A result without its explanation: of the scan that is stored by that hash, or is to be fetched."""

    ordinal: int
    sha256: str | None
    source_url: str | None
    label: str


def unexplained(session: Session, held: Claim) -> list[Unexplained]:
    """What an explaining unit has left to do, in order."""
    of = select(Unit.explains).where(Unit.id == held.unit_id).scalar_subquery()
    rows = session.execute(
        select(ScanResult.ordinal, Scan.sha256, ScanResult.source_url, ScanResult.label)
        .join(Scan, Scan.id == ScanResult.scan_id, isouter=True)
        .where(ScanResult.unit_id == of, ScanResult.state == ResultState.SUCCEEDED)
        .order_by(ScanResult.ordinal)
    ).all()
    done = pictures(session, held.job_id, [row.ordinal for row in rows])
    left = [row for row in rows if row.ordinal not in done]
    return [Unexplained(row.ordinal, row.sha256, row.source_url, row.label or "") for row in left]


Made = tuple[str, Blob]
"""An artifact's name and content."""


def keep(session: Session, held: Claim, made: Iterable[Made]) -> None:
    """Write explanations down: of each scan all that belongs to it, or nothing.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    require_held(session, held, progress_at=NOW)
    write(session, held, made)


def write(session: Session, held: Claim, made: Iterable[Made]) -> None:
    """The same in the transaction that has ended the unit under its fence."""
    rows = [
        {
            "job_id": held.job_id,
            "tenant_id": held.tenant_id,
            "name": name,
            "sha256": blob.sha256,
            "size": blob.size,
            "media_type": MEDIA_TYPES[name[-4:]],
        }
        for name, blob in made
    ]
    if rows:
        session.execute(insert(Artifact), rows)


@dataclass(frozen=True)
class Pictures:
    """A scan's artifacts for one class. `heatmap`: None in jobs of earlier versions; `is_blank`: it is 0 everywhere."""

    overlay: str
    heatmap: str | None
    is_blank: bool


def pictures(
    session: Session, job_id: uuid.UUID, ordinals: Sequence[int], words: Mapping[str, str] | None = None
) -> dict[int, dict[str | None, Pictures]]:
    """The explanations of these scans that are here: of the class that was found (None), and of those in `words`."""
    of_class: dict[str | None, str | None] = {None: None} | dict(words or {})
    parts = (OVERLAY, HEATMAP, BLANK)
    names = [name_of(ordinal, part, word) for ordinal in ordinals for word in of_class.values() for part in parts]
    wanted = any_(literal(names, ARRAY(String)))
    here = set(session.scalars(select(Artifact.name).where(Artifact.job_id == job_id, Artifact.name == wanted)))
    explained: dict[int, dict[str | None, Pictures]] = {}
    for ordinal in ordinals:
        for label, word in of_class.items():
            overlay, heatmap, blank = (name_of(ordinal, part, word) for part in parts)
            if overlay in here:
                seen = Pictures(overlay, heatmap if heatmap in here else None, blank in here)
                explained.setdefault(ordinal, {})[label] = seen
    return explained
