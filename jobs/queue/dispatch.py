"""The dispatcher's view of the queue, and its writes: dispatch, reserve, release, ask to yield.

A *dispatched* unit has a message in Redis, which an idle worker receives. A *reserved* unit has none: a busy worker
with short units claims it when it is done (`leases.claim_next`), which saves the trip through Redis. If no worker is
busy any more, a reserved unit is dispatched. Both are in the state `dispatched`; `rings`, the number of messages sent,
is 0 for a reserved one.

The cost does not grow with the queue: partial indexes over unfinished rows answer each question from their first rows.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, PreparedStatement, seconds
from jobs.states import JobKind, Lane, UnitState
from jobs.tables import Unit


@dataclass(frozen=True)
class WaitingUnit:
    """A unit that may be dispatched. `scans`: its size. `overdue`: dispatched before, and not claimed in time.
    `explains`: it computes explanations, not predictions."""

    unit_id: uuid.UUID
    lane: Lane
    tenant_id: str
    kind: JobKind
    scans: int
    overdue: bool = False
    reserved: bool = False
    explains: bool = False


@dataclass(frozen=True)
class RunningUnit:
    """A unit under lease. `worker`: NODE/INSTANCE. `can_yield`: it could hand back its remaining scans.
    `yield_requested`: it was asked to, and has not done so yet."""

    unit_id: uuid.UUID
    lane: Lane
    tenant_id: str
    worker: str
    can_yield: bool
    yield_requested: bool


@dataclass(frozen=True)
class Worker:
    """A live Celery worker, which runs one unit at a time. `name`: NODE/INSTANCE (`jobs.queue.processes`)."""

    name: str
    lanes: frozenset[Lane]


@dataclass(frozen=True)
class QueueSnapshot:
    """What the scheduler decides from. `dispatched`: messages in Redis per lane; `late`: those among them that no
    worker has claimed for `LATE_SECONDS`."""

    waiting: Sequence[WaitingUnit]
    dispatched: Mapping[Lane, int]
    running: Sequence[RunningUnit]
    workers: Sequence[Worker]
    late: Mapping[Lane, int] = field(default_factory=dict)


LATE_SECONDS = 1.0
"""An idle worker claims a dispatched unit in milliseconds. After this time (s) it has probably died."""

# A "loose index scan" jumps from one tenant with claimable units to the next; then come each tenant's first units:
# predictions before explanations, older jobs before younger ones. Units that wait for a time are not in this index, and
# finished jobs are never read. Whole rows are compared: with `lane = …` the planner may walk the primary key instead.
# The job is read by a scalar subquery, which the planner cannot turn into a join over all jobs.
SNAPSHOT = PreparedStatement(
    "snapshot",
    "float8, int, float8, float8",
    """
WITH RECURSIVE alive AS MATERIALIZED (
    SELECT name, lanes FROM processes
    WHERE kind = 'worker' AND seen_at > clock_timestamp() - make_interval(secs => $3)
), held AS MATERIALIZED (
    SELECT id, job_id, lane, tenant_id, yield_requested_at,
        split_part(worker, '/', 1) || '/' || split_part(worker, '/', 2) AS worker
    FROM units WHERE state = 'running'
), idle AS MATERIALIZED (
    SELECT count(*) AS workers FROM alive WHERE name NOT IN (SELECT worker FROM held WHERE worker IS NOT NULL)
), tenants AS (
    (SELECT lane, tenant_id FROM units WHERE state IN ('queued', 'dispatched') ORDER BY lane, tenant_id LIMIT 1)
    UNION ALL
    SELECT next_tenant.* FROM tenants CROSS JOIN LATERAL (
        SELECT lane, tenant_id FROM units
        WHERE state IN ('queued', 'dispatched') AND (lane, tenant_id) > (tenants.lane, tenants.tenant_id)
        ORDER BY lane, tenant_id LIMIT 1) AS next_tenant
), waiting AS (
    SELECT jsonb_agg(jsonb_build_array(due.id, tenants.lane, tenants.tenant_id, due.kind, due.scans,
        due.state = 'dispatched' AND due.rings > 0, due.state = 'dispatched' AND due.rings = 0,
        due.explains IS NOT NULL)) AS units
    FROM tenants CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT id, job_id, ordinal, lane, tenant_id, scans, state, rings, explains,
                (SELECT kind FROM jobs WHERE jobs.id = units.job_id AND cancel_requested_at IS NULL) AS kind
            FROM units
            WHERE state IN ('queued', 'dispatched')
                AND (lane, tenant_id) >= (tenants.lane, tenants.tenant_id)
                AND (lane, tenant_id) <= (tenants.lane, tenants.tenant_id)
                AND CASE WHEN state = 'queued' THEN not_before <= clock_timestamp()
                    ELSE rings = 0 OR dispatched_at < clock_timestamp()
                        - make_interval(secs => $1 * least(power(2, rings - 1), 8)) END
        ) AS unit
        WHERE kind IS NOT NULL
        ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal
        LIMIT $2 + (SELECT workers FROM idle)) AS due
)
SELECT waiting.units AS waiting,
    (SELECT jsonb_agg(jsonb_build_array(lane, number, late)) FROM (
        SELECT lane, count(*) AS number,
            count(*) FILTER (WHERE dispatched_at < clock_timestamp() - make_interval(secs => $4)) AS late
        FROM units WHERE state = 'dispatched' AND rings > 0 GROUP BY lane) AS counted) AS dispatched,
    (SELECT jsonb_agg(jsonb_build_array(held.id, held.lane, held.tenant_id, held.worker,
            kind = 'predict_batch' AND yield_requested_at IS NULL AND cancel_requested_at IS NULL,
            yield_requested_at IS NOT NULL))
        FROM held JOIN jobs ON jobs.id = held.job_id) AS running,
    (SELECT jsonb_agg(jsonb_build_array(name, lanes)) FROM alive) AS workers
FROM waiting
""",
)


def snapshot(session: Session, redispatch_seconds: float, alive_seconds: float, per_tenant: int = 64) -> QueueSnapshot:
    """What waits, and which workers have room for it.

    Claims are held by a child process of a worker (NODE/INSTANCE/PID); what counts here is its worker (NODE/INSTANCE).
    A claim of an instance that has died makes no other instance of that node busy.

    Args:
        redispatch_seconds: see `dispatch`.
        alive_seconds: a worker without a heartbeat for so long is left out.
        per_tenant: waiting units to return for each tenant in each lane, beside one for each idle worker.
    """
    row = SNAPSHOT(session, redispatch_seconds, per_tenant, alive_seconds, LATE_SECONDS).one()
    units, dispatched = row.waiting or (), row.dispatched or ()
    return QueueSnapshot(
        waiting=[WaitingUnit(uuid.UUID(u), Lane(lane), tenant, JobKind(k), *r) for u, lane, tenant, k, *r in units],
        dispatched={Lane(lane): number for lane, number, _ in dispatched},
        running=[RunningUnit(uuid.UUID(unit), Lane(lane), *rest) for unit, lane, *rest in row.running or ()],
        workers=[Worker(name, frozenset(map(Lane, lanes))) for name, lanes in row.workers or ()],
        late={Lane(lane): late for lane, _, late in dispatched},
    )


MARK = """
UPDATE units SET state = 'dispatched', dispatched_at = clock_timestamp(), rings = {rings}
FROM (SELECT id FROM units WHERE id = ANY ($1) AND ({due}) IS TRUE FOR UPDATE SKIP LOCKED) AS chosen
WHERE units.id = chosen.id RETURNING units.id
"""
DUE = "state = 'queued' AND not_before <= clock_timestamp()"
OVERDUE = "dispatched_at < clock_timestamp() - make_interval(secs => $2 * least(power(2, rings - 1), 8))"
DISPATCH = PreparedStatement(
    "dispatch",
    "uuid[], float8",
    MARK.format(rings="rings + 1", due=f"({DUE} OR state = 'dispatched' AND (rings = 0 OR {OVERDUE}))"),
)
RESERVE = PreparedStatement("reserve", "uuid[]", MARK.format(rings="0", due=DUE))


def dispatch(session: Session, unit_ids: Iterable[uuid.UUID], redispatch_seconds: float) -> set[uuid.UUID]:
    """Mark units as dispatched and return those that were marked: publish their messages after the commit.

    A unit that nobody claims is dispatched again after `redispatch_seconds`, doubled each time up to 8 times that.
    Whether a unit is due is checked again here, and rows locked by another dispatcher are skipped, so that two
    dispatchers never send the same message.
    """
    return {uuid.UUID(str(row.id)) for row in DISPATCH(session, _array(unit_ids), redispatch_seconds)}


def reserve(session: Session, unit_ids: Iterable[uuid.UUID]) -> None:
    """Leave units to busy workers that will be done soon."""
    RESERVE(session, _array(unit_ids))


def _array(unit_ids: Iterable[uuid.UUID]) -> str:
    return "{" + ",".join(map(str, unit_ids)) + "}"


def release(session: Session, unit_ids: Iterable[uuid.UUID], delay: float) -> None:
    """Take back units whose messages could not be published: they are queued again in `delay` seconds."""
    waiting = {"rings": 0, "dispatched_at": None, "not_before": NOW + seconds(delay)}
    _update_unlocked(session, unit_ids, Unit.state == UnitState.DISPATCHED, state=UnitState.SCHEDULED, **waiting)


def request_yield(session: Session, unit_ids: Iterable[uuid.UUID]) -> None:
    """Ask the workers that hold these units to hand back the remaining scans."""
    asked_now = and_(Unit.state == UnitState.RUNNING, Unit.yield_requested_at.is_(None))
    _update_unlocked(session, unit_ids, asked_now, yield_requested_at=NOW)


def _update_unlocked(
    session: Session, unit_ids: Iterable[uuid.UUID], which: ColumnElement[bool], **values: object
) -> None:
    """Update units, but for those that others are moving on: waiting for several could end in a deadlock."""
    free = select(Unit.id).where(Unit.id.in_(list(unit_ids)), which).with_for_update(skip_locked=True, key_share=True)
    chosen = update(Unit).where(Unit.id.in_(free), which).values(**values)
    session.execute(chosen.execution_options(synchronize_session=False))
