"""How fast the lanes are served, measured on their latest units: for ETAs, chunk sizes and reservations."""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from jobs.queue import processes
from jobs.settings import Settings
from jobs.states import JobKind, Lane, UnitState
from jobs.tables import Job, Unit

LATEST_UNITS = 20
"""Units of a lane that its pace is measured on."""
MIN_CHUNK, MAX_CHUNK = 16, 2048
"""Scans in a unit: a device computes about 16 at once, and the results of 2048 are written in well under a second."""


@dataclass(frozen=True)
class Pace:
    """How a lane is served, by its latest units."""

    seconds_per_scan: float
    scans_per_unit: float
    workers: int

    def seconds(self, ahead: int, own: int) -> float:
        """Time for `own` scans behind `ahead` others: at least that of one unit, which a single worker runs."""
        shared = (ahead + own) * self.seconds_per_scan / self.workers
        return max(shared, min(own, self.scans_per_unit) * self.seconds_per_scan)


def latest_units(lane: str) -> Select[Any, int]:
    """Duration (s) and scans of the lane's latest predicting units; without the time in which a worker, new to their
    network, loaded it."""
    took = func.extract("epoch", Unit.finished_at - Unit.started_at) - func.coalesce(Unit.warmup_seconds, 0)
    took = func.greatest(took, 0.001).label("seconds")
    succeeded = select(took, Unit.scans).where(
        Unit.lane == lane,
        Unit.state == UnitState.SUCCEEDED,
        Unit.explains.is_(None),
        Unit.kind.is_distinct_from(str(JobKind.INGEST)),  # checks of datasets share a lane with batches
    )
    return succeeded.order_by(Unit.finished_at.desc()).limit(LATEST_UNITS)


def lane_pace(session: Session, lane: str) -> Pace | None:
    """The lane's pace; None if no unit has succeeded in it yet, or no worker serves it."""
    latest = latest_units(lane).subquery()
    units, took, scans = session.execute(
        select(func.count(), func.sum(latest.c.seconds), func.sum(latest.c.scans))
    ).one()
    alive = processes.list_alive(session, processes.ALIVE_SECONDS)
    workers = sum(process.kind == processes.WORKER and lane in process.lanes for process in alive)
    return Pace(float(took) / scans, scans / units, workers) if units and workers else None


def chunk_size(session: Session, lane: str, settings: Settings) -> int:
    """Scans of a batch that one worker computes in about `chunk_seconds`, by the lane's latest units.

    Large enough that the overhead of a unit does not matter, small enough that little work is lost with a worker.
    """
    latest = latest_units(lane).subquery()
    took, scans = session.execute(select(func.sum(latest.c.seconds), func.sum(latest.c.scans))).one()
    if not scans or not took:
        return settings.chunk_scans
    return int(min(max(settings.chunk_seconds * scans / float(took), MIN_CHUNK), MAX_CHUNK))


MEAN_UNIT_SECONDS = """
SELECT lanes.name, avg(extract(epoch FROM finished_at - started_at) - coalesce(warmup_seconds, 0))::float
FROM unnest(CAST(:lanes AS text[])) AS lanes(name) CROSS JOIN LATERAL (
    SELECT started_at, finished_at, warmup_seconds FROM units
    WHERE units.lane = lanes.name AND state = 'succeeded' AND explains IS NULL
    ORDER BY finished_at DESC LIMIT 20) AS latest
GROUP BY lanes.name
"""


def mean_unit_seconds(session: Session) -> dict[Lane, float]:
    """Mean duration (s) of each lane's latest units, explanations aside. Lanes without any are left out."""
    rows = session.execute(text(MEAN_UNIT_SECONDS), {"lanes": [str(lane) for lane in Lane]})
    return {Lane(lane): mean for lane, mean in rows}


# --- jobs that run ---


@dataclass(frozen=True)
class RunningPace:
    """Of a running job: scans that its running units have `done`, and when it will end (s from now), if known."""

    done: int = 0
    seconds_left: float | None = None


UNKNOWN_PACE = RunningPace()

# OFFSET keeps the planner from the index of a job's units: only running ones are read, as many as there are workers.
RUNNING_UNITS = text("""
SELECT job_id, count(*) AS units, coalesce(sum(done), 0) AS done, coalesce(max(warmup_seconds), 0) AS warmup,
    max(extract(epoch FROM expected_at - clock_timestamp()))::float8 AS seconds
FROM (SELECT * FROM units WHERE state = 'running' OFFSET 0) AS running
WHERE job_id = ANY (:ids) AND explains IS NULL GROUP BY job_id
""")
WARMUPS = text("""
SELECT job_id, max(warmup_seconds) AS warmup
FROM (SELECT job_id, warmup_seconds FROM units WHERE lane = :lane AND state = 'succeeded' AND explains IS NULL
    ORDER BY finished_at DESC LIMIT 100) AS latest
WHERE job_id = ANY (:ids) AND warmup_seconds IS NOT NULL GROUP BY job_id
""")


def running_paces(session: Session, jobs: Sequence[Job], now: dt.datetime) -> dict[uuid.UUID, RunningPace]:
    """The paces of running trainings, which their workers tell, and of running batches: by the time since their start
    without that in which their workers loaded the network; before any scan is done, by the lane's latest units."""
    followed = [job for job in jobs if job.kind in (JobKind.TRAIN, JobKind.PREDICT_BATCH)]
    if not followed:
        return {}
    ids = [job.id for job in followed]
    running = {row.job_id: row for row in session.execute(RUNNING_UNITS, {"ids": ids})}
    lanes = {job.lane for job in followed if job.kind == JobKind.PREDICT_BATCH}
    warmups = {row.job_id: row.warmup for lane in lanes for row in session.execute(WARMUPS, {"lane": lane, "ids": ids})}
    paces = {lane: lane_pace(session, lane) for lane in lanes}
    found = {}
    for job in followed:
        units = running.get(job.id)
        if job.kind == JobKind.TRAIN:
            found[job.id] = _told(units)
        else:
            warmup = max(warmups.get(job.id, 0.0), units.warmup if units else 0.0)
            found[job.id] = _batch_pace(job, now, units, warmup, paces[job.lane])
    return found


def _told(units: Any) -> RunningPace:
    return RunningPace(0, max(units.seconds, 0.0) if units and units.seconds is not None else None)


def _batch_pace(job: Job, now: dt.datetime, units: Any, warmup: float, lane: Pace | None) -> RunningPace:
    running = int(units.done) if units else 0
    ended = job.succeeded + job.failed + job.cancelled
    done, left = ended + running, max(job.total - ended - running, 0)
    if done and job.started_at is not None:
        passed = max((now - job.started_at).total_seconds() - warmup, 0.0)
        return RunningPace(running, passed * left / done)
    if lane is None:
        return RunningPace(running)
    return RunningPace(running, left * lane.seconds_per_scan / max(units.units if units else 0, 1))
