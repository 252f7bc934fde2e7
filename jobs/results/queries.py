"""Reads and paging: no writes. Everything is asked for by tenant, so that another's id is as good as an unknown one.

Pages are by key, not by offset: `after` names the last row that the client has, so rows that arrive meanwhile shift
nothing.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, cast, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.errors import ArtifactNotFound, JobNotFound, NoResults, ScanNotFound
from jobs.paging import Page, page
from jobs.queue import retention
from jobs.queue.position import Place, places
from jobs.states import PREDICTIONS, TERMINAL, JobState, ResultState
from jobs.tables import NOT_SUCCEEDED, Artifact, Job, JobEvent, Json, ModelVersion, Scan, ScanResult

FURTHEST = 2**31 - 1
"""No scan of a job comes after this one."""


@dataclass(frozen=True)
class JobView:
    """A job as it stands at `now` by Postgres' clock. `place` is where it waits, if it does."""

    job: Job
    now: dt.datetime
    place: Place | None

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self.job.state in TERMINAL

    @property
    def pending(self) -> int:
        """Parts that have not ended."""
        job = self.job
        return job.total - job.succeeded - job.failed - job.cancelled

    @property
    def progress(self) -> float:
        """0 to 1. A batch's counters are truer than what its workers report, where they are ahead."""
        job = self.job
        done = 1 - self.pending / job.total if job.kind in PREDICTIONS and job.total else 0.0
        return max(job.progress, done)

    @property
    def queue_position(self) -> int | None:
        """How many waiting jobs are served before it, 1000 at most; null once it does not wait."""
        return self.place.position if self.place else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the end if work goes on as it did; null before anything can be said.

        A running job goes by its own pace so far, a waiting one by that of its lane's latest units.
        """
        if self.place is not None:
            return self.place.eta_seconds
        if self.job.state != JobState.RUNNING or self.job.started_at is None or self.progress <= 0:
            return None
        elapsed = (self.now - self.job.started_at).total_seconds()
        return round(max(0.0, elapsed * (1 - self.progress) / self.progress), 1)

    @property
    def scans_per_second(self) -> float | None:
        """A prediction's pace since it began, to three digits; null before a scan has ended. What was cancelled is no
        work done."""
        job = self.job
        done = job.succeeded + job.failed
        if job.kind not in PREDICTIONS or job.started_at is None or not done:
            return None
        elapsed = ((job.finished_at or self.now) - job.started_at).total_seconds()
        return float(f"{done / elapsed:.3g}") if elapsed > 0 else None


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list. `metadata` holds words of a query string: `1` finds the number and the text."""

    state: str | None = None
    kind: str | None = None
    created_after: dt.datetime | None = None
    metadata: dict[str, str] | None = None

    def clauses(self) -> list[ColumnElement[bool]]:
        """The filter in SQL."""
        found: list[ColumnElement[bool]] = []
        if self.state:
            found.append(Job.state == self.state)
        if self.kind:
            found.append(Job.kind == self.kind)
        if self.created_after:
            found.append(Job.created_at > self.created_after)
        return found + [_has_label(key, value) for key, value in (self.metadata or {}).items()]


def _has_label(key: str, value: str) -> ColumnElement[bool]:
    return or_(*(Job.labels.contains(cast({key: reading}, JSONB)) for reading in _readings(value)))


def _readings(value: str) -> list[Any]:
    """What a word of a query string may stand for in JSON: itself, and a boolean or number that is written so."""
    if value in ("true", "false"):
        return [value, value == "true"]
    try:
        number = float(value)
    except ValueError:
        return [value]
    # NaN and infinity are words of Python, not of JSON.
    return [value, int(number) if number.is_integer() else number] if abs(number) < 1e15 else [value]


def job(session: Session, tenant_id: str, job_id: uuid.UUID) -> JobView:
    """One job.

    Raises:
        JobNotFound
    """
    row = session.execute(_jobs(tenant_id).where(Job.id == job_id)).first()
    if row is None:
        raise JobNotFound
    return _views(session, [row])[0]


def jobs(session: Session, tenant_id: str, wanted: JobFilter, limit: int, after: uuid.UUID | None) -> Page[JobView]:
    """The tenant's jobs, newest first."""
    query = _jobs(tenant_id).where(*wanted.clauses()).order_by(Job.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Job.id < after)
    return page(_views(session, session.execute(query).all()), limit, lambda view: view.job.id)


def _jobs(tenant_id: str) -> Select[tuple[Job, dt.datetime]]:
    return select(Job, NOW.label("now")).where(Job.tenant_id == tenant_id)


def _views(session: Session, rows: Sequence[Any]) -> list[JobView]:
    found = places(session, [job.id for job, _ in rows if job.state == JobState.QUEUED])
    return [JobView(job, now, found.get(job.id)) for job, now in rows]


# --- what a job has brought forth ---


def results(
    session: Session, view: JobView, state: str | None = None, limit: int = 100, after: int | None = None
) -> Page[ScanResult]:
    """A prediction's results in the order of its scans: those that have ended, unless `state` says otherwise.

    While the job runs, they end before the first scan that still waits, and there are more to come: who follows `next`
    until there is no more has seen each result once, however many workers shared the scans.

    Raises:
        NoResults: the job predicts nothing.
        ResultsExpired: they were deleted, or are being deleted.
    """
    require_prediction(view)
    begin = -1 if after is None else after
    query = select(ScanResult).where(ScanResult.job_id == view.job.id, ScanResult.ordinal > begin)
    to_come = not view.terminal and state != ResultState.PENDING
    if to_come:
        waits = select(func.min(ScanResult.ordinal)).where(
            ScanResult.job_id == view.job.id, ScanResult.ordinal > begin, ScanResult.state == ResultState.PENDING
        )
        query = query.where(ScanResult.ordinal < func.coalesce(waits.scalar_subquery(), FURTHEST))
    query = query.where(_in_state(state)).order_by(ScanResult.ordinal).limit(limit + 1)
    found = page(session.scalars(query).all(), limit, lambda row: row.ordinal)
    if view.terminal:
        retention.require_kept(session, view.job.id)
    if found.has_more or not to_come:
        return found
    last = found.data[-1].ordinal if found.data else after
    return Page(found.data, True, None if last is None else str(last))


def require_prediction(view: JobView) -> None:
    """Refuse a job without results per scan.

    Raises:
        NoResults
    """
    if view.job.kind not in PREDICTIONS:
        raise NoResults(kind=view.job.kind)


def _in_state(state: str | None) -> ColumnElement[bool]:
    if state is None:
        return ScanResult.state != ResultState.PENDING
    if state in (ResultState.FAILED, ResultState.CANCELLED):
        # In the words of the index, so that a few among millions are found by it.
        return and_(ScanResult.state == state, ScanResult.state.in_(NOT_SUCCEEDED))
    return ScanResult.state == state


def classes(session: Session, view: JobView) -> list[str]:
    """The classes of the model that the job is pinned to; none where it is pinned to nothing."""
    model = session.get(ModelVersion, view.job.model_id) if view.job.model_id else None
    return list(model.classes) if model else []


def events(session: Session, job_id: uuid.UUID, limit: int = 100, after: int = 0) -> Page[JobEvent]:
    """What happened to the job, oldest first. The verbs lock the job, so its events' ids follow their order."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    rows = session.scalars(query.order_by(JobEvent.id).limit(limit + 1)).all()
    return page(rows, limit, lambda row: row.id)


def epochs(session: Session, job_id: uuid.UUID) -> list[Json]:
    """The epochs of a training's latest attempt; of an epoch that was repeated after a resume, the latest.

    An attempt that resumed at epoch k continues the one before: its first k epochs are taken from there.
    """
    rows = session.scalars(
        select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "epoch").order_by(JobEvent.id)
    ).all()
    latest: dict[int, Json] = {}
    for data in rows:
        number = int(data.get("epoch", 0))
        # An attempt that starts again at 1 throws away what a lost one had reached.
        latest = {**{n: e for n, e in latest.items() if n < number}, number: data}
    return [latest[number] for number in sorted(latest)]


def artifacts(session: Session, job_id: uuid.UUID, limit: int = 100, after: str = "") -> Page[Artifact]:
    """The job's artifacts by name: a batch has as many explanations as scans."""
    query = select(Artifact).where(Artifact.job_id == job_id, Artifact.name > after)
    rows = session.scalars(query.order_by(Artifact.name).limit(limit + 1)).all()
    return page(rows, limit, lambda row: row.name)


def artifact(session: Session, job_id: uuid.UUID, name: str) -> Artifact:
    """One artifact.

    Raises:
        ArtifactNotFound
    """
    found = session.get(Artifact, (job_id, name))
    if found is None:
        raise ArtifactNotFound
    return found


# --- scans ---


def scan(session: Session, tenant_id: str, scan_id: uuid.UUID) -> Scan:
    """One scan.

    Raises:
        ScanNotFound
    """
    found = session.scalar(select(Scan).where(Scan.id == scan_id, Scan.tenant_id == tenant_id))
    if found is None:
        raise ScanNotFound
    return found


def known_scans(session: Session, tenant_id: str, scan_ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    """Which of the ids are scans of the tenant."""
    return set(session.scalars(select(Scan.id).where(Scan.tenant_id == tenant_id, Scan.id.in_(scan_ids))))


def scans_by_hash(session: Session, tenant_id: str, hashes: Sequence[str]) -> dict[str, uuid.UUID]:
    """The tenant's scans with these contents (SHA-256 in hex): an id for each that is stored."""
    mine = select(Scan.sha256, Scan.id).where(Scan.tenant_id == tenant_id, Scan.sha256.in_(hashes))
    return {row.sha256: row.id for row in session.execute(mine)}
