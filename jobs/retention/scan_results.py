"""What is left of the results of a deleted scan: that there was one. Counts and pages of their jobs stay whole."""

import uuid
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import case, delete, func, select, update
from sqlalchemy.orm import Session

from jobs.errors import ScanDeleted
from jobs.queue.explanations import artifact_name
from jobs.queue.leases import with_job_lock
from jobs.states import ResultState
from jobs.tables import Artifact, Deletion, DeletionKind, Job, ScanResult, Truth

JOBS = 50
"""Jobs in one transaction."""
ERROR = {"code": ScanDeleted.code, "detail": "The scan was deleted, and with it its result.", "retryable": False}
_OF_THE_SCAN = (
    "scan_id", "frame", "name", "custom_id", "patient", "study", "source_url", "label", "confidence", "probabilities",
    "disposition", "reason", "ood_score",
)  # fmt: skip


def clear_results(session: Session, deletion: Deletion, rows: int) -> "Counter[str]":
    """Clear up to about `rows` results of a scan that is being deleted, with their explanations, then its feedback.
    Jobs that have not ended keep theirs until they have."""
    gone: Counter[str] = Counter()
    if deletion.kind != DeletionKind.SCAN:
        return gone
    scan_id = uuid.UUID(deletion.target)
    for _ in range(JOBS):
        if gone.total() >= rows or not (of_job := _clear_next_job(session, scan_id, rows)):
            break
        gone.update(of_job)
    return gone if gone.total() else Counter(feedback=_delete_feedback(session, scan_id, rows))


def _clear_next_job(session: Session, scan_id: uuid.UUID, rows: int) -> "Counter[str]":
    """Of one job: a transaction must not wait for the locks of several."""
    with_it = select(ScanResult.job_id).where(ScanResult.scan_id == scan_id)
    ended = select(Job.id).where(Job.id.in_(with_it), Job.finished_at.is_not(None)).order_by(Job.id).limit(1)
    job_id = session.scalar(with_job_lock(ended, skip_locked=True))
    if job_id is None:
        return Counter()
    mine = ScanResult.job_id == job_id, ScanResult.scan_id == scan_id
    ordinals = session.scalars(select(ScanResult.ordinal).where(*mine).order_by(ScanResult.ordinal).limit(rows)).all()
    values = {**dict.fromkeys(_OF_THE_SCAN), "error": ERROR, "identity": {}, "output": _nothing()}
    cleared = update(ScanResult).where(ScanResult.job_id == job_id, ScanResult.ordinal.in_(ordinals)).values(**values)
    session.execute(cleared.execution_options(synchronize_session=False))
    return Counter(results=len(ordinals), artifacts=_delete_explanations(session, job_id, ordinals))


def _nothing():  # type: ignore[no-untyped-def]
    """A succeeded result has some output: the database demands it."""
    return case((ScanResult.state == ResultState.SUCCEEDED, func.jsonb_build_object()), else_=None)


def _delete_explanations(session: Session, job_id: uuid.UUID, ordinals: Sequence[int]) -> int:
    of_scan = func.split_part(Artifact.name, ".", 1).in_([artifact_name(ordinal, "") for ordinal in ordinals])
    gone = delete(Artifact).where(Artifact.job_id == job_id, of_scan).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def _delete_feedback(session: Session, scan_id: uuid.UUID, rows: int) -> int:
    some = select(Truth.id).where(Truth.scan_id == scan_id).limit(rows)
    gone = delete(Truth).where(Truth.id.in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]
