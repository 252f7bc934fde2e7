"""Reads of jobs, results, events and artifacts. Every query is by tenant: another tenant's id is unknown.

Pages are by key, not by offset: `after` is the key of the last row of the previous page, so that new rows shift
nothing.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select, tuple_
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.errors import ArtifactNotFound, JobNotFound, NoResults
from jobs.paging import Page, page
from jobs.queue import kept
from jobs.queue.pace import UNKNOWN_PACE, RunningPace, running_paces
from jobs.queue.position import QueuePosition, queue_positions
from jobs.results.job_filter import JobFilter
from jobs.states import PREDICTIONS, TERMINAL, JobState, ResultState
from jobs.tables import NOT_SUCCEEDED, Artifact, Job, JobEvent, Json, ModelVersion, ScanResult
from jobs.tables.columns import LAST_ID

MAX_ORDINAL = 2**31 - 1
"""Greater than any ordinal of a scan in a job."""
MOST_PROGRESS = 0.999
"""While a job has not ended: its explanations, say, may still run."""
START = -1
"""Less than any: `after` of the first page."""


@dataclass(frozen=True)
class JobView:
    """A job at the time `now` of Postgres' clock.

    `in_queue`: its position while it is queued. `model_drift`: `ModelVersion.drift`, of predictions by the champion.
    `running`: its pace while it runs.
    """

    job: Job
    now: dt.datetime
    in_queue: QueuePosition | None
    model_drift: Json | None = None
    running: RunningPace = UNKNOWN_PACE

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self.job.state in TERMINAL

    @property
    def pending(self) -> int:
        """Scans (or the one unit of another kind) that have not ended."""
        job = self.job
        return job.total - job.succeeded - job.failed - job.cancelled

    @property
    def progress(self) -> float:
        """0 to 1, which only the end of a job is: what the workers report, or how many of a prediction's scans are
        done, if that is more."""
        job = self.job
        left = self.pending - self.running.done
        done = 1 - left / job.total if job.kind in PREDICTIONS and job.total else 0.0
        return max(job.progress, done if self.terminal else min(done, MOST_PROGRESS))

    @property
    def queue_position(self) -> int | None:
        """Queued jobs that are served first, up to 1000; None if it is not queued."""
        return self.in_queue.position if self.in_queue else None

    @property
    def eta_seconds(self) -> float | None:
        """Estimated seconds until the job ends; None while there is no basis for an estimate.

        A running job is estimated by its own pace, a queued one by that of its lane's latest units.
        """
        if self.in_queue is not None:
            return self.in_queue.eta_seconds
        if self.job.state == JobState.RUNNING and self.running.seconds_left is not None:
            return round(self.running.seconds_left, 1)
        if self.job.state != JobState.RUNNING or self.job.started_at is None or self.progress <= 0:
            return None
        elapsed = (self.now - self.job.started_at).total_seconds()
        return round(max(0.0, elapsed * (1 - self.progress) / self.progress), 1)

    @property
    def scans_per_second(self) -> float | None:
        """A prediction's mean pace since its start, to three digits, without cancelled scans; None before the first."""
        job = self.job
        done = job.succeeded + job.failed
        if job.kind not in PREDICTIONS or job.started_at is None or not done:
            return None
        elapsed = ((job.finished_at or self.now) - job.started_at).total_seconds()
        return float(f"{done / elapsed:.3g}") if elapsed > 0 else None


def job(session: Session, tenant_id: str, job_id: uuid.UUID) -> JobView:
    """One job.

    Raises:
        JobNotFound
    """
    row = session.execute(_views_of().where(Job.tenant_id == tenant_id, Job.id == job_id)).first()
    if row is None:
        raise JobNotFound
    return _views(session, [row])[0]


def jobs(session: Session, tenant_id: str, wanted: JobFilter, limit: int, after: uuid.UUID | None) -> Page[JobView]:
    """The tenant's jobs, newest first."""
    query = _views_of().where(*_in_order(tenant_id, wanted, after or LAST_ID), *wanted.clauses())
    newest = query.order_by(*(column.desc() for column in wanted.order)).limit(limit + 1)
    return page(_views(session, session.execute(newest).all()), limit, lambda view: view.job.id)


def _in_order(tenant_id: str, wanted: JobFilter, before: uuid.UUID) -> list[ColumnElement[bool]]:
    """The tenant's jobs before this id, as a part of the index that has them in order.

    Comparing whole keys leaves the planner only that index. With `tenant_id = …` it may walk the primary key instead,
    past all jobs of other tenants.
    """
    if wanted.is_narrow:  # there is an index of it
        return [Job.tenant_id == tenant_id, Job.id < before]
    key, fixed = tuple_(*wanted.order), [tenant_id, *(getattr(wanted, column.key) for column in wanted.order[1:-1])]
    return [key > tuple_(*fixed, wanted.first_id), key < tuple_(*fixed, before)]


def _views_of() -> Select[tuple[Job, dt.datetime, Json | None]]:
    drift = select(ModelVersion.drift).where(ModelVersion.id == Job.model_id, ModelVersion.champion)
    return select(Job, NOW.label("now"), drift.correlate(Job).scalar_subquery().label("drift"))


def _views(session: Session, rows: Sequence[Any]) -> list[JobView]:
    found = queue_positions(session, [job.id for job, *_ in rows if job.state == JobState.QUEUED])
    running = [job for job, *_ in rows if job.state == JobState.RUNNING]
    paces = running_paces(session, running, rows[0].now) if running else {}
    return [JobView(job, now, found.get(job.id), drift, paces.get(job.id, UNKNOWN_PACE)) for job, now, drift in rows]


# --- results, events and artifacts of a job ---


def results(
    session: Session, view: JobView, state: str | None = None, limit: int = 100, after: int | None = None
) -> Page[ScanResult]:
    """A prediction's finished results in the order of its scans; `state` selects others.

    While the job runs, the pages stop before the first pending scan and `has_more` stays true: a client that follows
    `next` to the end sees each result once, however many workers share the scans. `next` of an empty page is `after`.

    Raises:
        NoResults: the job is not a prediction.
        ResultsExpired: results were deleted, or are being deleted.
    """
    require_prediction(view)
    first = START if after is None else after
    query = select(ScanResult).where(ScanResult.job_id == view.job.id, ScanResult.ordinal > first)
    growing = not view.terminal and state != ResultState.PENDING
    if growing:
        pending = select(func.min(ScanResult.ordinal)).where(
            ScanResult.job_id == view.job.id, ScanResult.ordinal > first, ScanResult.state == ResultState.PENDING
        )
        query = query.where(ScanResult.ordinal < func.coalesce(pending.scalar_subquery(), MAX_ORDINAL))
    query = query.where(_in_state(state)).order_by(ScanResult.ordinal).limit(limit + 1)
    found = page(session.scalars(query).all(), limit, lambda row: row.ordinal)
    if view.terminal:
        kept.require_kept(session, view.job.id)
    if found.has_more or not growing:
        return found
    return Page(found.data, True, str(found.data[-1].ordinal if found.data else first))


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
        # The predicate of the partial index, so that it is used.
        return and_(ScanResult.state == state, ScanResult.state.in_(NOT_SUCCEEDED))
    return ScanResult.state == state


def classes(session: Session, view: JobView) -> list[str]:
    """The classes of the model that the job is pinned to; none if it has no model."""
    model = session.get(ModelVersion, view.job.model_id) if view.job.model_id else None
    return list(model.classes) if model else []


def events(session: Session, job_id: uuid.UUID, limit: int = 100, after: int = 0) -> Page[JobEvent]:
    """The job's events, oldest first. Transitions lock the job, so the ids of its events follow their order.

    Raises:
        JobNotFound: the job is being deleted.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    rows = session.scalars(query.order_by(JobEvent.id).limit(limit + 1)).all()
    if not rows or rows[0].type != kept.FIRST_EVENT:
        kept.require_events(session, job_id)
    return page(rows, limit, lambda row: row.id)


def epochs(session: Session, job_id: uuid.UUID) -> list[Json]:
    """The epochs of a training's latest attempt.

    An attempt that resumed at epoch k continues the previous attempt, whose first k epochs are included.

    Raises:
        JobNotFound: the job is being deleted.
    """
    rows = session.scalars(
        select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "epoch").order_by(JobEvent.id)
    ).all()
    kept.require_events(session, job_id)
    latest: dict[int, Json] = {}
    for data in rows:
        number = int(data.get("epoch", 0))
        # An attempt that restarts at an earlier epoch replaces the later ones of the lost attempt.
        latest = {**{n: e for n, e in latest.items() if n < number}, number: data}
    return [latest[number] for number in sorted(latest)]


def artifacts(session: Session, job_id: uuid.UUID, limit: int = 100, after: str = "") -> Page[Artifact]:
    """A page of the job's artifacts by name: a batch has explanations for every scan, or none once these expire.

    Raises:
        JobNotFound: the job was deleted meanwhile.
    """
    query = select(Artifact).where(Artifact.job_id == job_id, Artifact.name > after)
    query = query.order_by(Artifact.name).limit(limit + 1)
    rows = session.scalars(query).all()
    if not kept.are_kept(session, job_id):
        kept.require_job(session, job_id)
        rows = session.scalars(query.where(~kept.IS_EXPLANATION)).all()
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
