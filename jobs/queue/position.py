"""Where a job stands in the queue, and when it may end: at the same cost however long the queue is.

The fair order of a lane: the tenants take turns, each with its oldest job first. Before a job come the jobs of its own
tenant that are older, and of each other tenant as many, or one more where that one is older too. Nothing is looked at
beyond `FAR` jobs: a place of 1000 means 1000 or more.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from jobs.queue import processes
from jobs.settings import Settings
from jobs.states import UnitState
from jobs.tables import Unit

FAR = 1000
"""No place is counted further than this."""
LATEST_UNITS = 20
"""Units that a lane's pace is taken from."""
LEAST_CHUNK, MOST_CHUNK = 16, 2048
"""Scans in a unit. A device takes some 16 at once, and the ends of 2048 are written in well under a second."""
ALIVE_SECONDS = 60.0
"""A worker that was seen within this time serves its lanes."""


@dataclass(frozen=True)
class Place:
    """`position`: queued jobs that are served before it, `FAR` at most. `eta_seconds`: until its end, if known."""

    position: int
    eta_seconds: float | None


@dataclass(frozen=True)
class Pace:
    """How a lane is served: what its latest units took, and by how many workers."""

    seconds_per_scan: float
    scans_per_unit: float
    workers: int

    def seconds(self, ahead: int, own: int) -> float:
        """Time for `own` scans after `ahead` others; at least that of one unit, which no two workers share."""
        shared = (ahead + own) * self.seconds_per_scan / self.workers
        return max(shared, min(own, self.scans_per_unit) * self.seconds_per_scan)


# Comparing whole rows and ordering by all three columns leaves the planner one index that gives this order,
# ix_jobs_unfinished, which holds no history. With `lane = …` it may walk the primary key, past everybody's jobs.
# A running job is counted for its turn and for the scans that it still has, but it does not wait: it is in no position.
PLACES = text("""
SELECT mine.id, mine.lane, mine.total AS own,
       own.turns >= :far OR own.queued + others.queued >= :far AS far,
       own.queued + others.queued AS position,
       own.scans + others.scans AS ahead
FROM jobs AS mine
CROSS JOIN LATERAL (
    SELECT count(*) AS turns, count(*) FILTER (WHERE state = 'queued') AS queued, coalesce(sum(scans), 0) AS scans
    FROM (
        SELECT state, total - succeeded - failed - cancelled AS scans
        FROM jobs
        WHERE finished_at IS NULL
          AND (lane, tenant_id, id) >= (mine.lane, mine.tenant_id, :least)
          AND (lane, tenant_id, id) < (mine.lane, mine.tenant_id, mine.id)
        ORDER BY lane, tenant_id, id LIMIT :far
    ) AS older
) AS own
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE state = 'queued') AS queued, coalesce(sum(scans), 0) AS scans
    FROM (
        SELECT theirs.state, theirs.scans
        FROM (
            SELECT tenant_id FROM tenant_loads WHERE scans > 0 AND tenant_id <> mine.tenant_id LIMIT :far
        ) AS other
        CROSS JOIN LATERAL (
            SELECT id, state, scans, row_number() OVER (ORDER BY lane, tenant_id, id) AS turn
            FROM (
                SELECT lane, tenant_id, id, state, total - succeeded - failed - cancelled AS scans
                FROM jobs
                WHERE finished_at IS NULL
                  AND (lane, tenant_id, id) >= (mine.lane, other.tenant_id, :least)
                  AND (lane, tenant_id, id) <= (mine.lane, other.tenant_id, :most)
                ORDER BY lane, tenant_id, id LIMIT :far
            ) AS oldest
            LIMIT own.turns + 1
        ) AS theirs
        WHERE theirs.turn <= own.turns OR theirs.id < mine.id
        LIMIT CASE WHEN own.turns < :far THEN :far ELSE 0 END
    ) AS before
) AS others
WHERE mine.id = ANY(:ids)
""").bindparams(far=FAR, least=uuid.UUID(int=0), most=uuid.UUID(int=2**128 - 1))


def places(session: Session, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Place]:
    """The places of jobs that wait."""
    if not job_ids:
        return {}
    rows = session.execute(PLACES, {"ids": list(job_ids)}).all()
    paces = {lane: _pace(session, lane) for lane in {row.lane for row in rows}}
    return {row.id: _place(row, paces[row.lane]) for row in rows}


def _place(row, pace: Pace | None) -> Place:  # type: ignore[no-untyped-def]
    if row.far:
        return Place(FAR, None)  # what lies further ahead was not counted, and half an answer is none
    return Place(row.position, round(pace.seconds(int(row.ahead), row.own), 1) if pace else None)


def latest_units(lane: str) -> Select[Any, int]:
    """What the lane's latest units took (s), and how many scans each had."""
    took = func.extract("epoch", Unit.finished_at - Unit.started_at).label("seconds")
    succeeded = select(took, Unit.scans).where(
        Unit.lane == lane, Unit.state == UnitState.SUCCEEDED, Unit.explains.is_(None)
    )
    return succeeded.order_by(Unit.finished_at.desc()).limit(LATEST_UNITS)


def chunk(session: Session, lane: str, settings: Settings) -> int:
    """How many scans of a batch one worker does in about `chunk_seconds`, by the lane's latest units.

    Large enough that what a unit costs beside its work is nothing, small enough that a lost one is soon made good.
    """
    latest = latest_units(lane).subquery()
    took, scans = session.execute(select(func.sum(latest.c.seconds), func.sum(latest.c.scans))).one()
    if not scans or not took:
        return settings.chunk_scans
    return int(min(max(settings.chunk_seconds * scans / float(took), LEAST_CHUNK), MOST_CHUNK))


def _pace(session: Session, lane: str) -> Pace | None:
    """The lane's pace; None where nothing has succeeded in it yet, or nobody serves it."""
    latest = latest_units(lane).subquery()
    units, took, scans = session.execute(
        select(func.count(), func.sum(latest.c.seconds), func.sum(latest.c.scans))
    ).one()
    alive = processes.seen(session, ALIVE_SECONDS)
    workers = sum(process.kind == processes.WORKER and lane in process.lanes for process in alive)
    return Pace(float(took) / scans, scans / units, workers) if units and workers else None
