"""Queue positions, ETAs and queue depth, at a cost that does not grow with the queue.

The fair order of a lane: tenants take turns, each with its oldest job first. Ahead of a job are the older jobs of its
own tenant and, of each other tenant, as many jobs, plus one if that one is older too. Counting stops at
`MAX_POSITION`: a position of 1000 means that 1000 jobs or more, waiting or running, are served first.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Select, func, select, text, true
from sqlalchemy.orm import Session

from jobs.queue.pace import Pace, lane_pace
from jobs.states import TERMINAL, UNIT_TERMINAL, JobState, Lane, UnitState
from jobs.tables import Job, Unit

MAX_POSITION = 1000
"""Where counting stops."""


@dataclass(frozen=True)
class QueuePosition:
    """`position`: queued jobs that are served first, up to `MAX_POSITION`. `eta_seconds`: until its end, if known."""

    position: int
    eta_seconds: float | None


# Comparing whole rows and ordering by all three columns leaves the planner one index with this order,
# ix_jobs_unfinished, which holds no finished jobs. With `lane = …` it may walk the primary key, past all jobs. A limit
# that it cannot read keeps it from sorting them all, since it then reckons with a tenth of the rows.
# A running job counts for its turn and its remaining scans, but not as a position: it does not wait.
POSITIONS = text("""
SELECT mine.id, mine.lane, mine.total AS own,
       own.turns + others.turns >= :far AS far,
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
        ORDER BY lane, tenant_id, id LIMIT (SELECT :far)
    ) AS older
) AS own
CROSS JOIN LATERAL (
    SELECT count(*) AS turns, count(*) FILTER (WHERE state = 'queued') AS queued, coalesce(sum(scans), 0) AS scans
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
                ORDER BY lane, tenant_id, id LIMIT (SELECT :far)
            ) AS oldest
            LIMIT own.turns + 1
        ) AS theirs
        WHERE theirs.turn <= own.turns OR theirs.id < mine.id
        LIMIT :far - own.turns
    ) AS before
) AS others
WHERE mine.id = ANY(:ids)
""").bindparams(far=MAX_POSITION, least=uuid.UUID(int=0), most=uuid.UUID(int=2**128 - 1))


def queue_positions(session: Session, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, QueuePosition]:
    """The positions of queued jobs."""
    if not job_ids:
        return {}
    rows = session.execute(POSITIONS, {"ids": list(job_ids)}).all()
    paces = {lane: lane_pace(session, lane) for lane in {row.lane for row in rows}}
    return {row.id: _position(row, paces[row.lane]) for row in rows}


def _position(row, pace: Pace | None) -> QueuePosition:  # type: ignore[no-untyped-def]
    if row.far:
        return QueuePosition(MAX_POSITION, None)  # the scans beyond were not counted, so that no ETA is known
    return QueuePosition(row.position, round(pace.seconds(int(row.ahead), row.own), 1) if pace else None)


# --- depth ---


def unfinished_jobs(session: Session, tenant_id: str) -> dict[str, int]:
    """The tenant's unfinished jobs by state."""
    mine = _unfinished(tenant_id).subquery()
    return _by_state(session, select(mine.c.state), [state for state in JobState if state not in TERMINAL])


def unfinished_units(session: Session, tenant_id: str) -> dict[str, int]:
    """The tenant's unfinished units by state."""
    mine = _unfinished(tenant_id).subquery()
    of_job = select(Unit.state).where(Unit.job_id == mine.c.id, Unit.finished_at.is_(None))
    # OFFSET 0 keeps the planner from reading everybody's unfinished units for a join.
    units = of_job.offset(0).lateral("units")
    found = select(units.c.state).select_from(mine.join(units, true()))
    return _by_state(session, found, [state for state in UnitState if state not in UNIT_TERMINAL])


def _unfinished(tenant_id: str) -> Select[uuid.UUID, str]:
    """The tenant's unfinished jobs: others' cost nothing. All lanes are named, since ix_jobs_unfinished begins with the
    lane."""
    return select(Job.id, Job.state).where(Job.lane.in_(Lane), Job.tenant_id == tenant_id, Job.finished_at.is_(None))


def _by_state(session: Session, found: Select[str], states: Sequence[StrEnum]) -> dict[str, int]:
    state = found.subquery().c.state
    counted: dict[str, int] = dict(tuple(row) for row in session.execute(select(state, func.count()).group_by(state)))
    return {str(state): counted.get(str(state), 0) for state in states}
