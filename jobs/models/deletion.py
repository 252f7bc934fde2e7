"""Deletion of a model version on request, together with the training that made it."""

import uuid

from sqlalchemy import delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.deletions import receipts
from jobs.deletions.of_jobs import forget_answers, hide, require_no_continuation
from jobs.errors import ModelNotFound, StillNeeded
from jobs.models import registry
from jobs.retention.batches import older_than
from jobs.tables import Deletion, DeletionKind, Job, ModelVersion, RegistryMirror


def delete_version(session: Session, tenant_id: str, wanted: str, by_key: uuid.UUID | None = None) -> Deletion:
    """Delete a version, its weights, its feedback and its training. Idempotent. The history of promotions stays, and a
    rollback passes it by.

    Raises:
        NoChampion, ModelNotFound
        StillNeeded: it is champion, or a job that has not ended is pinned to it, begins from it or reproduces it.
    """
    registry.lock(session, tenant_id)
    try:
        version = registry.resolve(session, tenant_id, wanted)
    except ModelNotFound:
        return receipts.repeated(session, tenant_id, DeletionKind.MODEL, wanted, ModelNotFound)
    forget_answers(session, tenant_id, [version.job_id])
    for table, key in ((Job, version.job_id), (ModelVersion, version.id)):
        session.execute(select(table.id).where(table.id == key).with_for_update(of=table))
    _require_unneeded(session, version)
    target = str(version.version)
    deletion = receipts.begin(session, tenant_id, DeletionKind.MODEL, target, by_key, model_id=version.id)
    hide(session, deletion, [version.job_id])
    # Without the run, so that MLflow's registry does not receive the version.
    hidden = {"tenant_id": receipts.hidden_tenant(deletion.id), "mlflow_run_id": None}
    session.execute(update(ModelVersion).where(ModelVersion.id == version.id).values(**hidden))
    # MLflow's alias of the newest version may have to move.
    session.execute(delete(RegistryMirror).where(RegistryMirror.tenant_id == tenant_id))
    return deletion


def delete_old(session: Session, days: float) -> bool:
    """Delete the oldest version that was made, and promoted last, more than `days` ago and that nothing needs. True:
    there may be more."""
    last = func.coalesce(ModelVersion.promoted_at, ModelVersion.created_at)
    unfinished = Job.finished_at.is_(None)
    pinned = exists().where(or_(Job.model_id == ModelVersion.id, Job.base_model_id == ModelVersion.id), unfinished)
    continued = or_(Job.retry_of == ModelVersion.job_id, Job.reproduction_of == ModelVersion.job_id)
    kept = or_(ModelVersion.champion, receipts.is_hidden(ModelVersion.tenant_id), pinned)
    kept = or_(kept, exists().where(continued, unfinished))
    old = select(ModelVersion.tenant_id, ModelVersion.version).where(older_than(last, days), ~kept).order_by(last)
    found = session.execute(old.limit(1)).first()
    if found is None:
        return False
    delete_version(session, found.tenant_id, str(found.version))
    return True


def _require_unneeded(session: Session, version: ModelVersion) -> None:
    if version.champion:
        raise StillNeeded(f"Version {version.version} is champion. Promote another one, and then delete it.")
    pinned = or_(Job.model_id == version.id, Job.base_model_id == version.id), Job.id != version.job_id
    job_id = session.scalar(select(Job.id).where(*pinned, Job.finished_at.is_(None)).limit(1))
    if job_id is not None:
        raise StillNeeded(f"Job {job_id} uses version {version.version}. Wait for its end, or cancel it.")
    require_no_continuation(session, version.job_id)
