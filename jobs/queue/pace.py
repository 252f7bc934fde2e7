"""How fast the lanes are served, measured on their latest units: for ETAs, chunk sizes and reservations."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from jobs.queue import processes
from jobs.settings import Settings
from jobs.states import Lane, UnitState
from jobs.tables import Unit

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
    """Duration (s) and scans of the lane's latest predicting units."""
    took = func.extract("epoch", Unit.finished_at - Unit.started_at).label("seconds")
    succeeded = select(took, Unit.scans).where(
        Unit.lane == lane, Unit.state == UnitState.SUCCEEDED, Unit.explains.is_(None)
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
SELECT lanes.name, avg(extract(epoch FROM latest.finished_at - latest.started_at))::float
FROM unnest(CAST(:lanes AS text[])) AS lanes(name) CROSS JOIN LATERAL (
    SELECT started_at, finished_at FROM units WHERE units.lane = lanes.name AND state = 'succeeded' AND explains IS NULL
    ORDER BY finished_at DESC LIMIT 20) AS latest
GROUP BY lanes.name
"""


def mean_unit_seconds(session: Session) -> dict[Lane, float]:
    """Mean duration (s) of each lane's latest predicting units. Lanes without any are left out."""
    rows = session.execute(text(MEAN_UNIT_SECONDS), {"lanes": [str(lane) for lane in Lane]})
    return {Lane(lane): mean for lane, mean in rows}
