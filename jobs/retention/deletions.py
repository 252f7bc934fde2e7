"""The background part of deletions that clients asked for (`jobs.deletions`): bounded batches, one after another.

Whatever a batch has not reached is found by the next one, also after a crash: rows of the hidden tenant, scans with the
deletion's id, released blobs and runs. Deletions take turns; one that waits for files or for MLflow is looked at again
a little later.

A job's scans go with it, unless another result or feedback needs them, or somebody has sent them again.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.db import NOW, Sessions, seconds
from jobs.deletions import receipts
from jobs.events import deliveries
from jobs.queue.checkpoints import FOLDER
from jobs.retention import jobs, local, scans
from jobs.retention.batches import ROWS, delete_some
from jobs.retention.scan_results import clear_results
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.storage.blobs import BlobStore
from jobs.tables import (
    Deletion,
    DeletionKind,
    Job,
    ModelEvaluation,
    ModelVersion,
    PredictionCount,
    ReleasedBlob,
    ReleasedRun,
    Scan,
    ScanResult,
    StudyCount,
    Truth,
)

Gone = Counter[str]
"""How many of what went in a batch, by kind."""
LONGEST_WAIT_SECONDS = 60.0
OF_MODEL: dict[str, jobs.Key] = {
    "prediction_counts": (PredictionCount.model_id, PredictionCount.day, PredictionCount.what, PredictionCount.bin),
    "study_counts": (StudyCount.model_id, StudyCount.day, StudyCount.study),
    "evaluations": (ModelEvaluation.model_id, ModelEvaluation.test_digest),
    "feedback": (Truth.model_id, Truth.scan_id, Truth.id),
}
"""What goes before a model version."""


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Delete the next batch of the deletion that has waited longest. True: there may be more.

    One that cannot go on, such as while a store is away, is put off, and delays no other.
    """
    with sessions.begin() as session:
        deletion_id = session.scalar(_due())
        trainings = session.scalars(_hidden_jobs(deletion_id).where(Job.kind == JobKind.TRAIN)).all()
    if deletion_id is None:
        return False
    try:
        for job_id in trainings:  # before their rows, which say that there is something to remove
            store.remove_folder(f"{FOLDER}/{job_id}")
        with sessions.begin() as session:
            ended = delete_batch(session, deletion_id, settings)
        if ended:
            local.sweep(sessions, settings)
            _update(sessions, deletion_id, finished_at=NOW)
    except Exception:
        _update(sessions, deletion_id, due_at=NOW + seconds(LONGEST_WAIT_SECONDS))
        raise
    return True


def _update(sessions: Sessions, deletion_id: uuid.UUID, **values: Any) -> None:
    with sessions.begin() as session:
        session.execute(update(Deletion).where(Deletion.id == deletion_id).values(**values))


def delete_batch(session: Session, deletion_id: uuid.UUID, settings: Settings, rows: int = ROWS) -> bool:
    """Delete up to `rows` rows. True: nothing is left, neither rows nor files nor runs in MLflow."""
    this = Deletion.id == deletion_id, Deletion.finished_at.is_(None)
    deletion = session.scalar(select(Deletion).where(*this).with_for_update(skip_locked=True))
    if deletion is None:
        return False
    receipts.release_for(session, deletion.id)
    gone = _delete_rows(session, deletion, settings, rows)
    receipts.add_counts(deletion, gone)
    wait = 0.0 if gone.total() else min(LONGEST_WAIT_SECONDS, settings.deletion_grace_seconds / 4)
    session.execute(update(Deletion).where(Deletion.id == deletion.id).values(due_at=NOW + seconds(wait)))
    session.flush()
    return not gone.total() and not _is_left(session, deletion, settings)


def _due():  # type: ignore[no-untyped-def]
    due = Deletion.finished_at.is_(None), Deletion.due_at <= func.now()
    return select(Deletion.id).where(*due).order_by(Deletion.due_at).limit(1)


def _delete_rows(session: Session, deletion: Deletion, settings: Settings, rows: int) -> Gone:
    """The first of these that finds something to delete."""
    model = _delete_model_rows(session, deletion, settings, rows)
    if model is None:  # it waits, and its training with it
        return Gone()
    parts: Sequence[Callable[[Session, Deletion, int], Gone]] = (clear_results, _delete_job_rows, _delete_scans)
    found = (part(session, deletion, rows) for part in parts)
    return model if model.total() else next((gone for gone in found if gone.total()), Gone())


# --- jobs ---


def _hidden_jobs(deletion_id: uuid.UUID | None):  # type: ignore[no-untyped-def]
    return select(Job.id).where(Job.tenant_id == f"{receipts.HIDDEN}{deletion_id}").order_by(Job.id)


def _delete_job_rows(session: Session, deletion: Deletion, rows: int) -> Gone:
    """Of one job. With its feedback, its deliveries, and its scans if it was asked for them."""
    locked = _hidden_jobs(deletion.id).limit(1).with_for_update(of=Job, skip_locked=True)
    job_id = session.scalar(locked)
    if job_id is None:
        return Gone()
    if sent := deliveries.delete_of_job(session, job_id, rows):
        return Gone(deliveries=sent)
    if deliveries.has_some(session, job_id):
        return Gone()
    if deletion.kind == DeletionKind.JOB and deletion.with_scans:
        _mark_scans(session, deletion, job_id, rows)
    return jobs.delete_rows(session, [job_id], rows, deletion.id, feedback=(Truth.job_id, Truth.id))


def _mark_scans(session: Session, deletion: Deletion, job_id: uuid.UUID, rows: int) -> None:
    """Of the results that are deleted next: their scans go, too, but for those that were sent again since."""
    following = select(ScanResult.scan_id).where(ScanResult.job_id == job_id).order_by(ScanResult.ordinal).limit(rows)
    before = func.coalesce(Scan.sent_at, Scan.created_at) < deletion.created_at
    mine = Scan.id.in_(following), Scan.deletion_id.is_(None), before
    # In the order in which others lock several scans: see `scan_registry.register`.
    ordered = select(Scan.id).where(*mine).order_by(Scan.sha256).with_for_update(key_share=True)
    marked = update(Scan).where(Scan.id.in_(ordered)).values(deletion_id=deletion.id)
    session.execute(marked.execution_options(synchronize_session=False))


# --- scans ---


def _delete_scans(session: Session, deletion: Deletion, rows: int) -> Gone:
    """Those that nothing refers to. Others stay, but for the one that was to be deleted: it waits."""
    mine = Scan.deletion_id == deletion.id
    scan_ids = session.scalars(select(Scan.id).where(mine).order_by(Scan.id).limit(rows)).all()
    if not scan_ids:
        return Gone()
    idempotency.forget(session, deletion.tenant_id, scan_ids)
    gone = Gone(scans=scans.delete_unreferred(session, scan_ids, mine))
    if deletion.kind != DeletionKind.SCAN:
        gone["scans_kept"] = _keep(session, deletion, scan_ids)
    return gone


def _keep(session: Session, deletion: Deletion, scan_ids: Sequence[uuid.UUID]) -> int:
    needed = Scan.id.in_(scan_ids), Scan.deletion_id == deletion.id, scans.is_referred()
    free = select(Scan.id).where(*needed).with_for_update(key_share=True, skip_locked=True)
    kept = update(Scan).where(Scan.id.in_(free)).values(deletion_id=None)
    return int(session.execute(kept.execution_options(synchronize_session=False)).rowcount)  # type: ignore[attr-defined]


# --- model versions ---


def _delete_model_rows(session: Session, deletion: Deletion, settings: Settings, rows: int) -> Gone | None:
    """Of a version. None: it waits, since a request that has found it before may still submit a job, which is done."""
    hidden = ModelVersion.id == deletion.model_id, ModelVersion.tenant_id == receipts.hidden_tenant(deletion.id)
    version = session.scalar(select(ModelVersion).where(*hidden).with_for_update(skip_locked=True))
    if deletion.model_id is None or version is None:
        return Gone()
    early = select(deletion.created_at > NOW - seconds(settings.deletion_grace_seconds))
    pinned = or_(Job.model_id == version.id, Job.base_model_id == version.id), Job.finished_at.is_(None)
    if session.scalar(early) or session.scalar(select(exists().where(*pinned))):
        return None
    gone = Gone()
    for name, key in OF_MODEL.items():
        if left := rows - gone.total():
            gone[name] = delete_some(session, key, [version.id], left)
    if gone.total() < rows:
        session.delete(version)
        gone["models"] = 1
    return gone


# --- what is left ---


def _is_left(session: Session, deletion: Deletion, settings: Settings) -> bool:
    """Whether anything waits: for a lock, for a job that has not ended, for a file or for MLflow. Runs do not, while
    there is no MLflow."""
    hidden = receipts.hidden_tenant(deletion.id)
    left = [Job.tenant_id == hidden, ModelVersion.tenant_id == hidden]
    left += [Scan.deletion_id == deletion.id, ReleasedBlob.deletion_id == deletion.id]
    left += [ReleasedRun.deletion_id == deletion.id] if settings.mlflow_url else []
    return any(session.scalar(select(exists().where(each))) for each in left)
