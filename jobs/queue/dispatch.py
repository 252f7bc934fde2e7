"""What the dispatcher sees and does in the tables: what waits, for whom there is room; ring, promise, unring.

A unit that is *rung* has a message in Redis, which wakes an idle worker. One that is *promised* has none: a busy worker
whose units are short takes it when it is done (`lifecycle.claim_next`), without a trip through Redis; should no worker
be busy any more, it is rung. Both are `dispatched`; `rings` tells them apart.

Nothing here grows with the queue: each question is answered by a partial index over what has not ended, and takes the
first few rows of it.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import text, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Prepared, seconds
from jobs.states import JobKind, Lane, UnitState
from jobs.tables import Unit


@dataclass(frozen=True)
class Waiting:
    """A unit whose doorbell may be rung. `scans`: its size. `again`: it was rung before, and nobody came. `explains`:
    it predicts nothing."""

    unit_id: uuid.UUID
    lane: Lane
    tenant_id: str
    kind: JobKind
    scans: int
    again: bool = False
    promised: bool = False
    explains: bool = False


@dataclass(frozen=True)
class Running:
    """A unit that a worker holds. `worker`: the Celery worker's name. `yields`: it could hand the rest back. `asked`:
    it has been asked to, and has not yet."""

    unit_id: uuid.UUID
    lane: Lane
    tenant_id: str
    worker: str
    yields: bool
    asked: bool


@dataclass(frozen=True)
class Worker:
    """A living Celery worker, one unit at a time."""

    name: str
    lanes: frozenset[Lane]


@dataclass(frozen=True)
class View:
    """All that decides whose doorbell is rung next."""

    waiting: Sequence[Waiting]
    rung: Mapping[Lane, int]
    running: Sequence[Running]
    workers: Sequence[Worker]


# The tenants that have something in a lane are found by jumping from one to the next in the index (a "loose index
# scan"); then the first jobs of each, and of each job its first units that nobody holds. Whole rows are compared, since
# with `lane = …` the planner may walk the primary key for the order of ids, past all jobs that ever were.
LOOK = Prepared(
    "look",
    "int, float8, int, float8",
    """
WITH RECURSIVE tenants AS (
    (SELECT lane, tenant_id FROM jobs WHERE finished_at IS NULL ORDER BY lane, tenant_id LIMIT 1)
    UNION ALL
    SELECT following.* FROM tenants CROSS JOIN LATERAL (
        SELECT lane, tenant_id FROM jobs
        WHERE finished_at IS NULL AND (lane, tenant_id) > (tenants.lane, tenants.tenant_id)
        ORDER BY lane, tenant_id LIMIT 1) AS following
), waiting AS (
    SELECT jsonb_agg(jsonb_build_array(due.id, tenants.lane, tenants.tenant_id, due.kind, due.scans,
        due.state = 'dispatched' AND due.rings > 0, due.state = 'dispatched' AND due.rings = 0,
        due.explains IS NOT NULL)) AS units
    FROM tenants CROSS JOIN LATERAL (
        SELECT unit.id, unit.scans, unit.state, unit.rings, unit.explains, jobs.kind
        FROM jobs CROSS JOIN LATERAL (
            SELECT id, scans, state, ordinal, not_before, dispatched_at, rings, explains FROM units
            WHERE units.job_id = jobs.id AND finished_at IS NULL AND state IN ('queued', 'dispatched')
            ORDER BY ordinal LIMIT $1) AS unit
        WHERE (jobs.lane, jobs.tenant_id) >= (tenants.lane, tenants.tenant_id)
            AND (jobs.lane, jobs.tenant_id) <= (tenants.lane, tenants.tenant_id) AND jobs.finished_at IS NULL
            AND CASE WHEN unit.state = 'queued' THEN unit.not_before <= clock_timestamp()
                ELSE unit.rings = 0 OR unit.dispatched_at < clock_timestamp()
                    - make_interval(secs => $2 * least(power(2, unit.rings - 1), 8)) END
        ORDER BY jobs.lane, jobs.tenant_id, jobs.id, unit.ordinal LIMIT $3) AS due
)
SELECT waiting.units AS waiting,
    (SELECT jsonb_object_agg(lane, number) FROM (
        SELECT lane, count(*) AS number FROM units WHERE state = 'dispatched' AND rings > 0 GROUP BY lane) AS counted
    ) AS rung,
    (SELECT jsonb_agg(jsonb_build_array(units.id, units.lane, units.tenant_id, split_part(units.worker, '/', 1),
            kind = 'predict_batch' AND yield_requested_at IS NULL AND cancel_requested_at IS NULL,
            yield_requested_at IS NOT NULL))
        FROM units JOIN jobs ON jobs.id = units.job_id WHERE units.state = 'running') AS running,
    (SELECT jsonb_agg(jsonb_build_array(split_part(name, '/', 1), lanes))
        FROM processes WHERE kind = 'worker' AND seen_at > clock_timestamp() - make_interval(secs => $4)) AS workers
FROM waiting
""",
)
PACE = """
SELECT lanes.name, avg(extract(epoch FROM latest.finished_at - latest.started_at))::float
FROM unnest(CAST(:lanes AS text[])) AS lanes(name) CROSS JOIN LATERAL (
    SELECT started_at, finished_at FROM units WHERE units.lane = lanes.name AND state = 'succeeded' AND explains IS NULL
    ORDER BY finished_at DESC LIMIT 20) AS latest
GROUP BY lanes.name
"""


def look(session: Session, ring_again: float, per_job: int, alive_seconds: float, ahead: int = 64) -> View:
    """What waits, and for whom there is room. Of each job at most `per_job` units are rung at the same time; of each
    tenant in each lane the first `ahead` waiting units are seen.

    A worker is known by its Celery name: claims carry it with its child's number, signs of life with its own.
    """
    seen = LOOK(session, per_job, ring_again, ahead, alive_seconds).one()
    units = seen.waiting or ()
    return View(
        waiting=[Waiting(uuid.UUID(u), Lane(lane), tenant, JobKind(k), *r) for u, lane, tenant, k, *r in units],
        rung={Lane(lane): number for lane, number in (seen.rung or {}).items()},
        running=[Running(uuid.UUID(unit), Lane(lane), *rest) for unit, lane, *rest in seen.running or ()],
        workers=[Worker(name, frozenset(map(Lane, lanes))) for name, lanes in seen.workers or ()],
    )


def pace(session: Session) -> dict[Lane, float]:
    """Seconds that the lately succeeded units of each lane took, on average; a lane without any is not in it."""
    rows = session.execute(text(PACE), {"lanes": [str(lane) for lane in Lane]})
    return {Lane(lane): mean for lane, mean in rows}


MARK = """
UPDATE units SET state = 'dispatched', dispatched_at = clock_timestamp(), rings = {rings}
FROM (SELECT id FROM units WHERE id = ANY ($1) AND {due} FOR UPDATE SKIP LOCKED) AS chosen
WHERE units.id = chosen.id RETURNING units.id
"""
NEW = "state = 'queued' AND not_before <= clock_timestamp()"
LATE = "dispatched_at < clock_timestamp() - make_interval(secs => $2 * least(power(2, rings - 1), 8))"
RING = Prepared(
    "ring",
    "uuid[], float8",
    MARK.format(rings="rings + 1", due=f"({NEW} OR state = 'dispatched' AND (rings = 0 OR {LATE}))"),
)
PROMISE = Prepared("promise", "uuid[]", MARK.format(rings="0", due=NEW))


def dispatch(session: Session, unit_ids: Iterable[uuid.UUID], ring_again: float) -> set[uuid.UUID]:
    """Mark units as rung, and return those that were: publish after the commit.

    Units that nobody claimed in time are rung again, after twice the time at each ring up to eight times it. Whether
    a unit is due is checked again here, and rows that another dispatcher holds are skipped: none is rung by two.
    """
    return {uuid.UUID(str(row.id)) for row in RING(session, _array(unit_ids), ring_again)}


def promise(session: Session, unit_ids: Iterable[uuid.UUID]) -> None:
    """Leave units to workers that are busy and will soon be done."""
    PROMISE(session, _array(unit_ids))


def _array(unit_ids: Iterable[uuid.UUID]) -> str:
    return "{" + ",".join(map(str, unit_ids)) + "}"


def unring(session: Session, unit_ids: Iterable[uuid.UUID], delay: float) -> None:
    """The doorbell could not be rung: the units wait `delay` seconds for the next try."""
    session.execute(
        update(Unit)
        .where(Unit.id.in_(list(unit_ids)), Unit.state == UnitState.DISPATCHED)
        .values(state=UnitState.QUEUED, rings=0, dispatched_at=None, not_before=NOW + seconds(delay))
        .execution_options(synchronize_session=False)
    )


def ask_to_yield(session: Session, unit_ids: Iterable[uuid.UUID]) -> None:
    """Ask the workers that hold these units to hand back what is left of them."""
    session.execute(
        update(Unit)
        .where(Unit.id.in_(list(unit_ids)), Unit.state == UnitState.RUNNING, Unit.yield_requested_at.is_(None))
        .values(yield_requested_at=NOW)
        .execution_options(synchronize_session=False)
    )
