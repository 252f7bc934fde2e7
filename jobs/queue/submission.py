"""Submit and retry jobs: row, units, pending results and first event, in the caller's transaction."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.errors import JobNotFound, QueueFull, QuotaExceeded, WeightsMissing, WrongState
from jobs.events import webhooks
from jobs.events.job_events import record, wake_dispatcher
from jobs.events.webhooks import Receiver
from jobs.queue import kept, processes
from jobs.queue.completion import finish_job_if_done
from jobs.queue.leases import with_job_lock
from jobs.queue.outcomes import add_counts
from jobs.settings import Settings
from jobs.states import PREDICTIONS, DatasetState, JobKind, JobState, Lane, ResultState
from jobs.tables import Dataset, Job, Json, ModelVersion, ScanResult, TenantLoad, Unit, new_id
from ml.spec.pipeline import DEFAULT_TASK, FILE, IMAGE
from ml.spec.registry import installed

RETRIABLE = (JobState.FAILED, JobState.PARTIALLY_SUCCEEDED, JobState.CANCELLED)


@dataclass(frozen=True)
class NewJob:
    """A validated request."""

    tenant_id: str
    kind: JobKind
    lane: Lane
    pipeline: str = IMAGE
    task: str = DEFAULT_TASK
    name: str | None = None
    params: Json | None = None
    metadata: Json | None = None
    dataset_id: uuid.UUID | None = None
    test_dataset_id: uuid.UUID | None = None
    source_url: str | None = None
    model_id: uuid.UUID | None = None
    model_version: int | None = None
    operating_point: Json | None = None
    base_model_id: uuid.UUID | None = None
    promote: str = "auto"
    created_by: uuid.UUID | None = None
    idempotency_key: str | None = None
    retry_of: uuid.UUID | None = None
    reproduction_of: uuid.UUID | None = None
    warnings: Sequence[Json] = ()
    receiver: Receiver | None = None


@dataclass(frozen=True)
class NewResult:
    """One scan of a prediction job: stored, or fetched later from `source_url`. With an `error` it has failed already.

    `custom_id`, `patient` and `study` are the client's own keys. `frame`: which of its frames, from 0; None: the whole
    file. `frames` above 1: it becomes so many results, one for each frame.
    """

    scan_id: uuid.UUID | None
    name: str | None = None
    custom_id: str | None = None
    error: Json | None = None
    patient: str | None = None
    study: str | None = None
    source_url: str | None = None
    frame: int | None = None
    frames: int = 1

    @property
    def by_frame(self) -> list["NewResult"]:
        """One result for each frame."""
        if self.frames == 1:
            return [self]
        return [replace(self, frame=frame, frames=1) for frame in range(self.frames)]


@dataclass(frozen=True)
class Quota:
    """Limits of the queue: scans and batches of one tenant, and scans of all tenants (`ceiling`)."""

    scans: int = 2**31
    batches: int = 2**31
    ceiling: int = 2**62

    @classmethod
    def of(cls, settings: Settings) -> "Quota":
        """The quota in the settings."""
        return cls(settings.quota_scans, settings.quota_batches, settings.queue_ceiling)


UNLIMITED = Quota()


def check_quota(session: Session, tenant_id: str, quota: Quota, scans: int = 1, batches: int = 0) -> None:
    """Fail early, before an upload is stored, if the queue has no room. `submit` decides.

    Raises:
        QuotaExceeded, QueueFull
    """
    _require_ceiling(quota, session.scalar(select(ALL_SCANS)) or 0, scans)
    load = session.get(TenantLoad, tenant_id)
    if load is not None:
        _require_quota(quota.scans, load.scans, scans, "scans")
        _require_quota(quota.batches, load.batches, batches, "batches")


def submit(
    session: Session, new: NewJob, scans: Sequence[NewResult] = (), chunk: int = 128, quota: Quota = UNLIMITED
) -> Job:
    """Insert a job, its units, its pending results and its first event; the commit notifies the dispatcher.

    A prediction gets one unit per `chunk` scans; any other job has one unit.

    Raises:
        QuotaExceeded: the tenant would exceed its quota.
        QueueFull: all tenants together would exceed the ceiling.
        WeightsMissing: no live worker can read the weights that a training would begin from.
    """
    if new.kind == JobKind.TRAIN:
        _require_weights(session, new)
    _require_quota(quota.scans, 0, sum(scan.frames for scan in scans), "scans")  # before any row is made of them
    scans = [one for scan in scans for one in scan.by_frame]
    job = _new_job(new, total=len(scans) or 1)
    session.add(job)
    session.flush()
    parts = _split_into_units(scans, chunk) if scans else [[]]
    units = [_unit(job, ordinal, len(part)) for ordinal, part in enumerate(parts)]
    if units:
        session.execute(insert(Unit), units)
    _insert_results(session, job, scans, {o: u["id"] for u, part in zip(units, parts, strict=True) for o in part})
    record(session, job.id, job.tenant_id, "submitted", {"kind": job.kind, "total": job.total})
    _add_load(session, job, quota)
    if new.receiver is not None:
        webhooks.attach(session, job.tenant_id, job.id, new.receiver)
    finish_job_if_done(session, job.id)  # a batch in which every scan failed already is finished
    wake_dispatcher(session, str(job.id))
    session.refresh(job)
    return job


def retry(session: Session, tenant_id: str, job_id: uuid.UUID, chunk: int = 128, quota: Quota = UNLIMITED) -> Job:
    """Submit the unsuccessful part of a job as a new job. The old job keeps its state and has one retry at most.

    A training resumes from its last checkpoint; a prediction repeats only the scans without a result.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: the job has not ended, or has succeeded, or what it needs was deleted.
        QuotaExceeded, QueueFull
    """
    mine = Job.id == job_id, Job.tenant_id == tenant_id
    _lock_dataset(session, *mine)
    old = session.scalar(with_job_lock(select(Job).where(*mine)))
    if old is None:
        raise JobNotFound
    if old.state not in RETRIABLE:
        raise WrongState(state=old.state, verb="retrying", allowed=" or ".join(RETRIABLE))
    made: Job | None = session.scalar(select(Job).where(Job.retry_of == job_id))
    if made is not None:
        return made
    if not kept.are_kept(session, job_id):
        raise WrongState("This job's results have expired, and with them which scans failed: submit those anew.")
    require_version(session, old)
    scans = _unsuccessful_scans(session, old)
    if old.kind in PREDICTIONS and not scans:
        detail = "None of this job's failed scans is stored: upload them again with a new job."
        raise WrongState(detail)
    job = submit(session, _retry_of(session, old), scans, chunk, quota)
    if old.kind == JobKind.INGEST:
        _move_dataset_check(session, old, job)
    return job


def require_version(session: Session, old: Job) -> None:
    """Refuse what no worker could do: with a version that was deleted since.

    Raises:
        WrongState
    """
    needed = old.model_id if old.kind in PREDICTIONS else old.base_model_id
    mine = select(ModelVersion.id).where(ModelVersion.id == needed, ModelVersion.tenant_id == old.tenant_id)
    if needed is not None and session.scalar(mine) is None:
        raise WrongState("The model version that this job needs was deleted: submit it anew, with another one.")


def _lock_dataset(session: Session, *job: ColumnElement[bool]) -> None:
    """Lock the job's dataset, before the job: whoever deletes it locks it first, then the jobs that used it."""
    used = Dataset.id == select(Job.dataset_id).where(*job).scalar_subquery()
    session.execute(select(Dataset.id).where(used).with_for_update(key_share=True))


def _move_dataset_check(session: Session, old: Job, new: Job) -> None:
    """Let the new job check the dataset, unless its check was completed."""
    unchecked = update(Dataset).where(Dataset.job_id == old.id, Dataset.state == DatasetState.CHECKING)
    if session.execute(unchecked.values(job_id=new.id)).rowcount == 0:  # type: ignore[attr-defined]
        raise WrongState("This dataset was checked to the end. GET /datasets/ID says what to mend; upload it anew.")


def _retry_of(session: Session, old: Job) -> NewJob:
    own = ("metadata", "idempotency_key", "retry_of", "warnings", "receiver")
    copied: Json = {field.name: getattr(old, field.name) for field in fields(NewJob) if field.name not in own}
    copied |= {"kind": JobKind(old.kind), "lane": Lane(old.lane)}
    return NewJob(**copied, metadata=old.labels, retry_of=old.id, receiver=webhooks.receiver_of(session, old.id))


def _unsuccessful_scans(session: Session, old: Job) -> list[NewResult]:
    rows = session.scalars(
        select(ScanResult)
        .where(ScanResult.job_id == old.id, ScanResult.state.in_((ResultState.FAILED, ResultState.CANCELLED)))
        .where(or_(ScanResult.scan_id.is_not(None), ScanResult.source_url.is_not(None)))
        .order_by(ScanResult.ordinal)
    )
    return [_retry_of_result(row) for row in rows]


def _retry_of_result(row: ScanResult) -> NewResult:
    return NewResult(row.scan_id, row.name, row.custom_id, None, row.patient, row.study, row.source_url, row.frame)


# --- the tenant's load ---


ALL_SCANS = select(func.coalesce(func.sum(TenantLoad.scans), 0)).scalar_subquery()
"""Scans of all tenants. Tenants without work have no row for long: `prune_loads`."""


def prune_loads(session: Session) -> None:
    """Remove the loads of tenants that have nothing in the queue, so that `ALL_SCANS` reads few rows."""
    idle = select(TenantLoad.tenant_id).where(TenantLoad.scans == 0, TenantLoad.batches == 0)
    gone = delete(TenantLoad).where(TenantLoad.tenant_id.in_(idle.with_for_update(skip_locked=True)))
    session.execute(gone.execution_options(synchronize_session=False))


def _add_load(session: Session, job: Job, quota: Quota) -> None:
    """Add the job to its tenant's load in one statement, whose result decides whether the quota is exceeded."""
    batches = int(job.kind == JobKind.PREDICT_BATCH)
    new = upsert(TenantLoad).values(tenant_id=job.tenant_id, scans=job.total, batches=batches)
    grown = {"scans": TenantLoad.scans + new.excluded.scans, "batches": TenantLoad.batches + new.excluded.batches}
    row = session.execute(
        new.on_conflict_do_update(index_elements=["tenant_id"], set_=grown).returning(
            TenantLoad.scans, TenantLoad.batches, ALL_SCANS.label("all_before")
        )
    ).one()
    _require_ceiling(quota, row.all_before, job.total)
    _require_quota(quota.scans, row.scans - job.total, job.total, "scans")
    _require_quota(quota.batches, row.batches - batches, batches, "batches")


def _require_quota(limit: int, queued: int, more: int, what: str) -> None:
    if more and queued + more > limit:
        raise QuotaExceeded(queued=queued, what=what, limit=limit)


def _require_ceiling(quota: Quota, queued: int | None, more: int) -> None:
    if (queued or 0) + more > quota.ceiling:
        raise QueueFull


# --- weights ---


def _require_weights(session: Session, new: NewJob) -> None:
    """Where nobody knows what workers can read, such as while none lives, the job is accepted and waits for them."""
    spec = installed().get(new.pipeline)
    needed = spec.stored.needed_weights(new.params or {}) if spec else None
    readable = processes.readable_weights(session, new.lane, new.pipeline) if needed else None
    if needed is None or readable is None or needed.name in readable:
        return
    shown = ", ".join(sorted(name for name in readable if not name.startswith(FILE))) or "none"
    detail = f"weights: no live worker can read {needed.name}; what they can read: {shown}. {needed.remedy}"
    raise WeightsMissing(detail, "/params/weights")


# --- rows ---


def _new_job(new: NewJob, total: int) -> Job:
    given = {**vars(new), "params": new.params or {}, "labels": new.metadata or {}, "warnings": list(new.warnings)}
    del given["metadata"], given["receiver"]  # SQLAlchemy has an attribute of the first name; no column of the other
    return Job(id=new_id(), total=total, **given)


def _unit(job: Job, ordinal: int, scans: int) -> Json:
    return {
        "id": new_id(),
        "tenant_id": job.tenant_id,
        "job_id": job.id,
        "kind": job.kind,
        "ordinal": ordinal,
        "lane": job.lane,
        "scans": max(1, scans),
    }


def _split_into_units(scans: Sequence[NewResult], chunk: int) -> list[list[int]]:
    """The ordinals of each unit: `chunk` distinct scans, without those that have failed already.

    All occurrences of a scan are in one unit, so that it is computed once.
    """
    by_source: dict[object, list[int]] = {}
    for ordinal, scan in enumerate(scans):
        if scan.error is None:
            by_source.setdefault((scan.scan_id or scan.source_url, scan.frame), []).append(ordinal)
    distinct = list(by_source.values())
    return [
        [ordinal for same in distinct[start : start + chunk] for ordinal in same]
        for start in range(0, len(distinct), chunk)
    ]


def _insert_results(session: Session, job: Job, scans: Sequence[NewResult], unit_of: Mapping[int, uuid.UUID]) -> None:
    failed = sum(scan.error is not None for scan in scans)
    now = session.scalar(select(NOW)) if failed else None
    rows = [
        {
            "job_id": job.id,
            "ordinal": ordinal,
            "tenant_id": job.tenant_id,
            "unit_id": unit_of.get(ordinal),
            "scan_id": scan.scan_id,
            "name": scan.name,
            "custom_id": scan.custom_id,
            "patient": scan.patient,
            "study": scan.study,
            "source_url": scan.source_url,
            "frame": scan.frame,
            "error": scan.error,
            "state": ResultState.FAILED if scan.error else ResultState.PENDING,
            "finished_at": now if scan.error else None,
        }
        for ordinal, scan in enumerate(scans)
    ]
    if rows:
        session.execute(insert(ScanResult), rows)
        add_counts(session, job.id, failed=failed)
