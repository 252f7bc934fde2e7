"""Isolate a scan that kills its workers: its chunk is split until that scan fails alone."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.events.job_events import record
from jobs.queue.leases import Claim, add_unit
from jobs.states import PREDICTIONS, JobKind, ResultState
from jobs.tables import Json, ScanResult, Unit

PARTS = 8
"""A chunk of 128 scans is down to one after three splits; halving would cost seven workers."""
SUSPECT_CODES = frozenset({"WORKER_LOST", "STALLED", "INTERNAL"})
"""Errors that a single scan may cause, unlike a full disk or an unreachable database."""


def should_split(kind: JobKind, error: Json, failures: int, max_failures: int) -> bool:
    """Whether the next failure of a requeued unit would be its last, and a single scan may be the cause."""
    return kind in PREDICTIONS and error.get("code") in SUSPECT_CODES and failures >= max_failures - 1


def split(session: Session, claim: Claim, failures: int) -> None:
    """Split the pending scans of a queued unit into up to `PARTS` units with this number of failures each.

    The unit keeps the first part. A single scan is left as it is.
    """
    ordinals = _pending(session, claim)
    if len(ordinals) < 2:
        return
    size = -(-len(ordinals) // PARTS)
    parts = [ordinals[start : start + size] for start in range(0, len(ordinals), size)]
    values = {"failures": failures, "scans": len(parts[0])}
    session.execute(
        update(Unit).where(Unit.id == claim.unit_id).values(**values).execution_options(synchronize_session=False)
    )
    for part in parts[1:]:
        unit_id, _ = add_unit(session, claim, scans=len(part), failures=failures)
        session.execute(
            update(ScanResult)
            .where(ScanResult.job_id == claim.job_id, ScanResult.ordinal.in_(part))
            .values(unit_id=unit_id)
            .execution_options(synchronize_session=False)
        )
    record(session, claim.job_id, claim.tenant_id, "split", {"attempt": claim.attempt, "parts": len(parts)})


def _pending(session: Session, claim: Claim) -> Sequence[int]:
    of_unit = select(ScanResult.ordinal).where(ScanResult.unit_id == claim.unit_id)
    return session.scalars(of_unit.where(ScanResult.state == ResultState.PENDING).order_by(ScanResult.ordinal)).all()
