"""Retention of results: those of ended predictions are deleted, with their explanations; the job stays.

A job's results are deleted in order, and `results_expired_at` is set with the last batch: `jobs.queue.kept` tells from
that whether a reader has read all of them.
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import Select, and_, func, insert, literal, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions
from jobs.deletions import receipts
from jobs.queue.kept import IS_EXPLANATION, first
from jobs.retention.batches import ROWS, delete_some, older_than
from jobs.settings import Settings
from jobs.states import PREDICTIONS
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Job, JobEvent, ScanResult

JOBS = 200
"""Jobs per transaction."""


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Delete a batch of results by RENALQ_RESULTS_DAYS, or RENALQ_JOB_DAYS if that is less. True: there are more."""
    limits = [days for days in (settings.results_days, settings.job_days) if days]
    if not limits:
        return False
    with sessions.begin() as session:
        return expire(session, min(limits))


def expire(session: Session, days: float, rows: int = ROWS) -> bool:
    """Delete a batch of results and explanations of predictions that ended more than `days` ago. True: there are more.

    Locked jobs are skipped.
    """
    job_ids = _lock_expired_jobs(session, days)
    if not job_ids:
        return False
    left = rows - delete_some(session, (ScanResult.job_id, ScanResult.ordinal), job_ids, rows)
    if left:
        delete_some(session, (Artifact.job_id, Artifact.name), job_ids, left, IS_EXPLANATION)
    emptied = _emptied(session, job_ids)
    _mark_expired(session, emptied)
    return len(emptied) < len(job_ids) or len(job_ids) == JOBS


def oldest(days: float) -> Select[uuid.UUID]:
    """The next jobs whose results expire. The index ix_jobs_unexpired has this condition."""
    ended = Job.kind.in_(PREDICTIONS), Job.results_expired_at.is_(None), older_than(Job.finished_at, days)
    # Of what is deleted on request, results take their scans along: see jobs/retention/deletions.py.
    old = select(Job.id).where(*ended, ~receipts.is_hidden(Job.tenant_id))
    return old.order_by(Job.finished_at, Job.id).limit(JOBS)


def _lock_expired_jobs(session: Session, days: float) -> Sequence[uuid.UUID]:
    return session.scalars(oldest(days).with_for_update(of=Job, key_share=True, skip_locked=True)).all()


def _emptied(session: Session, job_ids: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
    nothing_left = and_(first(ScanResult.ordinal).is_(None), first(Artifact.name, IS_EXPLANATION).is_(None))
    return session.scalars(select(Job.id).where(Job.id.in_(job_ids), nothing_left)).all()


def _mark_expired(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    events = select(Job.id, Job.tenant_id, literal("results_expired"), func.jsonb_build_object("total", Job.total))
    names = ["job_id", "tenant_id", "type", "data"]
    session.execute(insert(JobEvent).from_select(names, events.where(Job.id.in_(job_ids))))
    marked = update(Job).where(Job.id.in_(job_ids)).values(results_expired_at=NOW)
    session.execute(marked.execution_options(synchronize_session=False))
