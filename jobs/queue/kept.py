"""Whether a reader has read all of what it asked for: checks after reads that may overlap a deletion by retention.

Results and events are deleted oldest first, in several transactions. So a reader that finds the first one after its
read has read all of them; a deleted job has none.
"""

import uuid
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from jobs.errors import JobNotFound, ResultsExpired
from jobs.queue.explanations import FOLDER
from jobs.states import PREDICTIONS
from jobs.tables import Artifact, Job, JobEvent, ScanResult

IS_EXPLANATION = Artifact.name.startswith(FOLDER)
"""SQL: the artifact belongs to an explanation, and goes with the results."""
FIRST_EVENT = "submitted"


def first(column: InstrumentedAttribute[Any], *which: ColumnElement[bool]) -> Any:
    """SQL: the minimum of the column over the job's rows, or null. Unlike EXISTS, this always uses the index."""
    return select(func.min(column)).where(column.class_.job_id == Job.id, *which).scalar_subquery()


def require_kept(session: Session, job_id: uuid.UUID) -> None:
    """Call this after reading results.

    Raises:
        ResultsExpired
        JobNotFound: the job was deleted meanwhile.
    """
    if not are_kept(session, job_id):
        require_job(session, job_id)
        raise ResultsExpired


def are_kept(session: Session, job_id: uuid.UUID) -> bool:
    """Whether no result of the job was deleted. Jobs of other kinds have none."""
    first_is_here = or_(Job.kind.not_in(PREDICTIONS), func.coalesce(first(ScanResult.ordinal) == 0, False))
    kept = select(and_(Job.results_expired_at.is_(None), first_is_here)).where(Job.id == job_id)
    return bool(session.scalar(kept))


def require_events(session: Session, job_id: uuid.UUID) -> None:
    """Call this after reading events.

    Raises:
        JobNotFound: the job is being deleted, or was deleted.
    """
    oldest = select(JobEvent.type).where(JobEvent.job_id == job_id).order_by(JobEvent.id).limit(1)
    if session.scalar(oldest) != FIRST_EVENT:
        raise JobNotFound


def require_job(session: Session, job_id: uuid.UUID) -> None:
    """Call this after reading artifacts, which are deleted with the job.

    Raises:
        JobNotFound: the job was deleted.
    """
    if session.scalar(select(Job.id).where(Job.id == job_id)) is None:
        raise JobNotFound
