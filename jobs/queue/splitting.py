"""One scan that kills every worker must not take its chunk along: the chunk is split until that scan is alone."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.queue.job_events import record
from jobs.queue.leases import Claim, add_unit
from jobs.states import PREDICTIONS, JobKind, ResultState
from jobs.tables import Json, ScanResult, Unit

PARTS = 8
"""A chunk of 128 scans is down to one in three splits; in two halves it would take seven deaths."""
SUSPECT = frozenset({"WORKER_LOST", "STALLED", "INTERNAL"})
"""Errors that a single scan may have caused. A full disk or an absent database is nobody's scan's fault."""


def is_suspect(kind: JobKind, error: Json, failures: int, max_failures: int) -> bool:
    """Whether a unit that goes back to the queue has failed so often that its next failure would be its last."""
    return kind in PREDICTIONS and error.get("code") in SUSPECT and failures >= max_failures - 1


def split(session: Session, held: Claim, failures: int) -> None:
    """Cut what is left of a queued unit into parts, each with so many failures behind it. One scan stays as it is.

    The unit keeps the first part; each other part becomes a unit of its own.
    """
    ordinals = _pending(session, held)
    if len(ordinals) < 2:
        return
    size = -(-len(ordinals) // PARTS)
    parts = [ordinals[start : start + size] for start in range(0, len(ordinals), size)]
    values = {"failures": failures, "scans": len(parts[0])}
    session.execute(
        update(Unit).where(Unit.id == held.unit_id).values(**values).execution_options(synchronize_session=False)
    )
    for part in parts[1:]:
        own = add_unit(session, held, scans=len(part), failures=failures)
        session.execute(
            update(ScanResult)
            .where(ScanResult.job_id == held.job_id, ScanResult.ordinal.in_(part))
            .values(unit_id=own)
            .execution_options(synchronize_session=False)
        )
    record(session, held.job_id, held.tenant_id, "split", {"attempt": held.attempt, "parts": len(parts)})


def _pending(session: Session, held: Claim) -> Sequence[int]:
    of_unit = select(ScanResult.ordinal).where(ScanResult.unit_id == held.unit_id)
    return session.scalars(of_unit.where(ScanResult.state == ResultState.PENDING).order_by(ScanResult.ordinal)).all()
