"""How a job comes to be: its row, its units, its pending results and its first event, in the caller's transaction."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from jobs import lifecycle
from jobs.states import JobKind, Lane, ResultState
from jobs.tables import Job, Json, ScanResult, Unit, new_id


@dataclass(frozen=True)
class NewJob:
    """What a client asked for, checked."""

    tenant_id: str
    kind: JobKind
    lane: Lane
    name: str | None = None
    params: Json | None = None
    metadata: Json | None = None
    dataset_id: uuid.UUID | None = None
    source_url: str | None = None
    model_id: uuid.UUID | None = None
    model_version: int | None = None
    promote: str = "auto"
    created_by: uuid.UUID | None = None


@dataclass(frozen=True)
class NewResult:
    """One scan of a prediction job. With an `error` it has failed before it began."""

    scan_id: uuid.UUID | None
    name: str | None = None
    custom_id: str | None = None
    error: Json | None = None


def submit(session: Session, new: NewJob, scans: Sequence[NewResult] = (), chunk: int = 128) -> Job:
    """Insert a job, its units, its pending results and its first event; ring the dispatcher at commit.

    A prediction gets one unit for each `chunk` scans; any other job has one unit.
    """
    job = _new_job(new, total=len(scans) or 1)
    session.add(job)
    session.flush()
    workable = [(ordinal, scan) for ordinal, scan in enumerate(scans) if scan.error is None]
    chunks = [workable[i : i + chunk] for i in range(0, len(workable), chunk)] if scans else [[]]
    units = [_unit(job, ordinal) for ordinal in range(len(chunks))]
    if units:
        session.execute(insert(Unit), units)
    _insert_results(session, job, scans, {o: u["id"] for u, c in zip(units, chunks, strict=True) for o, _ in c})
    lifecycle.record(session, job.id, job.tenant_id, "submitted", {"kind": job.kind, "total": job.total})
    lifecycle.end_if_done(session, job.id)  # a batch of broken scans alone has nothing to wait for
    session.execute(select(func.pg_notify(lifecycle.UNITS_CHANNEL, "")))
    session.refresh(job)
    return job


def _new_job(new: NewJob, total: int) -> Job:
    return Job(
        id=new_id(),
        tenant_id=new.tenant_id,
        kind=new.kind,
        lane=new.lane,
        name=new.name,
        params=new.params or {},
        labels=new.metadata or {},
        dataset_id=new.dataset_id,
        source_url=new.source_url,
        model_id=new.model_id,
        model_version=new.model_version,
        promote=new.promote,
        created_by=new.created_by,
        total=total,
    )


def _unit(job: Job, ordinal: int) -> Json:
    return {
        "id": new_id(),
        "tenant_id": job.tenant_id,
        "job_id": job.id,
        "ordinal": ordinal,
        "lane": job.lane,
    }


def _insert_results(session: Session, job: Job, scans: Sequence[NewResult], unit_of: Mapping[int, uuid.UUID]) -> None:
    rows = [
        {
            "job_id": job.id,
            "ordinal": ordinal,
            "tenant_id": job.tenant_id,
            "unit_id": unit_of.get(ordinal),
            "scan_id": scan.scan_id,
            "name": scan.name,
            "custom_id": scan.custom_id,
            "error": scan.error,
            "state": ResultState.FAILED if scan.error else ResultState.PENDING,
            "finished_at": dt.datetime.now(dt.UTC) if scan.error else None,
        }
        for ordinal, scan in enumerate(scans)
    ]
    if rows:
        session.execute(insert(ScanResult), rows)
        lifecycle.count(session, job.id, failed=sum(scan.error is not None for scan in scans))
