"""Explanations of a prediction's results: units of their own behind those that predict, so that no result waits.

An explanation is an artifact of its job, named by its scan's ordinal. An explaining unit writes each as it comes: what
is written when it is interrupted or lost stays, and the next attempt does the rest.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from jobs.artifacts import Blob
from jobs.bookkeeping import NOW, Claim, add_unit, require_held
from jobs.states import ResultState
from jobs.tables import Artifact, Scan, ScanResult, Unit

FOLDER = "explanations/"


def name_of(ordinal: int) -> str:
    """The artifact's name; names are ordered as their scans are."""
    return f"{FOLDER}{ordinal:06}.png"


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
    done = named(session, held.job_id, [row.ordinal for row in rows])
    left = [row for row in rows if row.ordinal not in done]
    return [Unexplained(row.ordinal, row.sha256, row.source_url, row.label or "") for row in left]


def keep(session: Session, held: Claim, made: Iterable[tuple[int, Blob]]) -> None:
    """Write explanations down, as PNG.

    Raises:
        LeaseLost: another worker holds the unit, or it has ended; nothing was written.
    """
    require_held(session, held, progress_at=NOW)
    rows = [
        {
            "job_id": held.job_id,
            "tenant_id": held.tenant_id,
            "name": name_of(ordinal),
            "sha256": blob.sha256,
            "size": blob.size,
            "media_type": "image/png",
        }
        for ordinal, blob in made
    ]
    if rows:
        session.execute(insert(Artifact), rows)


def named(session: Session, job_id: uuid.UUID, ordinals: Iterable[int]) -> dict[int, str]:
    """The explanations of these scans that are here, by name."""
    names = {name_of(ordinal): ordinal for ordinal in ordinals}
    made = session.scalars(select(Artifact.name).where(Artifact.job_id == job_id, Artifact.name.in_(names)))
    return {names[name]: name for name in made}
