"""The dispatcher's view of the queue, and its writes: dispatch, reserve, release, ask to yield.

A *dispatched* unit has a message in Redis, which an idle worker receives. A *reserved* unit has none: a busy worker
with short units claims it when it is done (`leases.claim_next`), which saves the trip through Redis. If no worker is
busy any more, a reserved unit is dispatched. Both are in the state `dispatched`; `rings`, the number of messages sent,
is 0 for a reserved one.

The cost does not grow with the queue: partial indexes over unfinished rows answer each question from their first rows.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, PreparedStatement, seconds
from jobs.events.job_events import PLACE
from jobs.queue.leases import job_is
from jobs.states import JobKind, Lane, UnitState
from jobs.tables import IS_CANCELLING, Unit


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
    job_id: uuid.UUID | None = None


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
    worker has claimed for `LATE_SECONDS`. `cut_off`: the lanes and tenants of which more units wait than were read."""

    waiting: Sequence[WaitingUnit]
    dispatched: Mapping[Lane, int]
    running: Sequence[RunningUnit]
    workers: Sequence[Worker]
    late: Mapping[Lane, int] = field(default_factory=dict)
    cut_off: AbstractSet[tuple[Lane, str]] = frozenset()


LATE_SECONDS = 1.0
"""An idle worker claims a dispatched unit in milliseconds. After this time (s) it has probably died."""

FULL_SECONDS = 10.0
"""A reader reads the whole queue so often (s), in case that it was not told of something."""

# Full ($5): a "loose index scan" jumps from one tenant with claimable units to the next, and all dispatched and running
# units are read. Otherwise only the queues in $6 to $10, from their first claimable units on (job, ordinal), those of
# the jobs in $11 from the ordinals in $12 on, and the units in $13. Each tenant has a queue of predictions and one of
# explanations. Units that wait for a time are not in the index, and jobs are not read, for which see `leases.CLAIM`.
# Whole rows are compared: with `lane = …` the planner may walk the primary key instead. OFFSET keeps a unit's kind from
# being asked for twice.
READ = """
WITH RECURSIVE alive AS MATERIALIZED (
    SELECT name, lanes FROM processes
    WHERE kind = 'worker' AND seen_at > clock_timestamp() - make_interval(secs => $3)
), active AS MATERIALIZED (
    SELECT units.*, split_part(worker, '/', 1) || '/' || split_part(worker, '/', 2) AS holder FROM (
        SELECT id, job_id, lane, tenant_id, kind, state, rings, dispatched_at, yield_requested_at, worker
        FROM units WHERE $5 AND state = 'running'
        UNION ALL
        SELECT id, job_id, lane, tenant_id, kind, state, rings, dispatched_at, yield_requested_at, worker
        FROM units WHERE $5 AND state = 'dispatched'
        UNION ALL
        SELECT id, job_id, lane, tenant_id, kind, state, rings, dispatched_at, yield_requested_at, worker
        FROM units WHERE NOT $5 AND id = ANY ($13) AND state IN ('dispatched', 'running')) AS units
), idle AS MATERIALIZED (
    SELECT count(*) AS workers FROM alive WHERE NOT EXISTS (
        SELECT FROM active WHERE state = 'running' AND holder = alive.name)
), found AS (
    (SELECT lane, tenant_id, explains IS NOT NULL AS explains, job_id AS first, ordinal FROM units
    WHERE $5 AND state IN ('queued', 'dispatched')
    ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal LIMIT 1)
    UNION ALL
    SELECT following.* FROM found CROSS JOIN LATERAL (
        SELECT lane, tenant_id, explains IS NOT NULL, job_id, ordinal FROM units
        WHERE state IN ('queued', 'dispatched')
            AND (lane, tenant_id, (explains IS NOT NULL)) > (found.lane, found.tenant_id, found.explains)
        ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal LIMIT 1) AS following
), known AS MATERIALIZED (
    SELECT DISTINCT ON (lane, tenant_id, explains) lane, tenant_id, explains, first, ordinal FROM (
        SELECT * FROM unnest($6, $7, $8, $9, $10) AS key (lane, tenant_id, explains, first, ordinal)
        UNION ALL
        SELECT lane, tenant_id, explains, job_id, ordinal
        FROM unnest($11, $12) AS noticed (job_id, ordinal) CROSS JOIN LATERAL (
            SELECT lane, tenant_id FROM units WHERE units.job_id = noticed.job_id AND units.ordinal = 0 OFFSET 0
        ) AS unit CROSS JOIN (VALUES (false), (true)) AS both_queues (explains)) AS keys
    WHERE NOT $5 ORDER BY lane, tenant_id, explains, first, ordinal
), queues AS MATERIALIZED (
    SELECT * FROM found
    UNION ALL
    SELECT lane, tenant_id, explains, following.first, following.ordinal
    FROM known LEFT JOIN LATERAL (
        SELECT job_id AS first, ordinal FROM units
        WHERE state IN ('queued', 'dispatched')
            AND (lane, tenant_id, (explains IS NOT NULL), job_id, ordinal)
                >= (known.lane, known.tenant_id, known.explains, known.first, known.ordinal)
            AND (lane, tenant_id, (explains IS NOT NULL)) <= (known.lane, known.tenant_id, known.explains)
        ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal LIMIT 1) AS following ON true
), share AS MATERIALIZED (
    SELECT $2 + ceil((SELECT workers FROM idle) / greatest(count(first), 1)::float8)::int AS units FROM queues
), waiting AS (
    SELECT jsonb_agg(jsonb_build_array(due.id, due.job_id, queues.lane, queues.tenant_id, due.kind, due.scans,
        due.state = 'dispatched' AND due.rings > 0, due.state = 'dispatched' AND due.rings = 0, queues.explains))
        AS units
    FROM queues CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT id, job_id, scans, state, rings, CASE WHEN NOT ({unit_is_cancelled})
                THEN coalesce(kind, (SELECT kind FROM jobs WHERE jobs.id = units.job_id)) END AS kind
            FROM units
            WHERE state IN ('queued', 'dispatched')
                AND (lane, tenant_id, (explains IS NOT NULL), job_id, ordinal)
                    >= (queues.lane, queues.tenant_id, queues.explains, queues.first, queues.ordinal)
                AND (lane, tenant_id, (explains IS NOT NULL)) <= (queues.lane, queues.tenant_id, queues.explains)
                AND CASE WHEN state = 'queued' THEN not_before <= clock_timestamp()
                    ELSE rings = 0 OR dispatched_at < clock_timestamp()
                        - make_interval(secs => $1 * least(power(2, rings - 1), 8)) END
            ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal OFFSET 0
        ) AS unit
        WHERE kind IS NOT NULL LIMIT (SELECT units FROM share)) AS due
    WHERE queues.first IS NOT NULL
)
SELECT waiting.units AS waiting,
    (SELECT jsonb_agg(jsonb_build_array(lane, tenant_id, explains, first, ordinal))
        FROM queues WHERE first IS NOT NULL) AS queues,
    (SELECT jsonb_agg(jsonb_build_array(id, lane, rings > 0,
            dispatched_at < clock_timestamp() - make_interval(secs => $4)))
        FROM active WHERE state = 'dispatched') AS dispatched,
    (SELECT jsonb_agg(jsonb_build_array(id, lane, tenant_id, holder,
            coalesce(kind, (SELECT kind FROM jobs WHERE jobs.id = active.job_id)) = 'predict_batch'
                AND yield_requested_at IS NULL AND NOT ({active_is_cancelled}),
            yield_requested_at IS NOT NULL))
        FROM active WHERE state = 'running') AS running,
    (SELECT jsonb_agg(jsonb_build_array(name, lanes)) FROM alive) AS workers,
    (SELECT units FROM share) AS share
FROM waiting
"""
SNAPSHOT = PreparedStatement(
    "snapshot",
    "float8, int, float8, float8, bool, text[], text[], bool[], uuid[], int[], uuid[], int[], uuid[]",
    READ.format(unit_is_cancelled=job_is(IS_CANCELLING, "units"), active_is_cancelled=job_is(IS_CANCELLING, "active")),
)


class QueueReader:
    """Reads snapshots for one dispatcher, at a cost that does not grow with what has ended.

    As long as any transaction is older (a backup, a long report), Postgres keeps the index entries of units that have
    ended since, and whoever reads an index from its front steps over all of them. So the reader remembers where each
    tenant's first claimable unit is, and which units are dispatched or running; what is queued behind its back is
    notified with the job's id and the unit's ordinal (`notice`). Every `FULL_SECONDS` it reads everything.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at = -FULL_SECONDS
        self._queues: list[tuple[str, str, bool, str, int]] = []  # lane, tenant, explains, first job and ordinal
        self._active: set[str] = set()
        self._noticed: dict[str, int] = {}  # the lowest ordinal of each job

    def notice(self, payloads: Iterable[str]) -> None:
        """What notifications of the units' channel said: where new claimable units are (`job_events.place`), or other
        words. An empty one may mean anything: it comes from a process of an older release."""
        for payload in payloads:
            if not payload:
                self._full_at = -FULL_SECONDS
            elif place := PLACE.fullmatch(payload):
                job_id, ordinal = place["job"], int(place["ordinal"] or 0)
                self._noticed[job_id] = min(ordinal, self._noticed.get(job_id, ordinal))

    def read(
        self, session: Session, redispatch_seconds: float, alive_seconds: float, per_tenant: int = 64
    ) -> QueueSnapshot:
        """What waits, and which workers have room for it.

        Claims are held by a child process of a worker (NODE/INSTANCE/PID); what counts here is its worker
        (NODE/INSTANCE). A claim of an instance that has died makes no other instance of that node busy.

        Args:
            redispatch_seconds: see `dispatch`.
            alive_seconds: a worker without a heartbeat for so long is left out.
            per_tenant: waiting units to return for each tenant in each lane, beside its share of the idle workers.
        """
        now = self._clock()
        full = now - self._full_at >= FULL_SECONDS
        limits = redispatch_seconds, per_tenant, alive_seconds, LATE_SECONDS
        queues = [_array(column) for column in zip(*self._queues, strict=True)] or ["{}"] * 5
        noticed = _array(self._noticed), _array(self._noticed.values())
        row = SNAPSHOT(session, *limits, full, *queues, *noticed, _array(self._active)).one()
        self._full_at = now if full else self._full_at
        self._queues, self._noticed = [tuple(queue) for queue in row.queues or ()], {}
        self._active = {unit[0] for unit in [*(row.dispatched or ()), *(row.running or ())]}
        return _snapshot(row)

    @property
    def only_notice(self) -> tuple[str, int] | None:
        """The job and ordinal that the notices since the last read named, if they named one place alone."""
        return next(iter(self._noticed.items())) if len(self._noticed) == 1 else None

    def marked(self, unit_ids: Iterable[uuid.UUID]) -> None:
        """These units were dispatched or reserved since the last read."""
        self._active.update(map(str, unit_ids))


def _snapshot(row: Any) -> QueueSnapshot:
    read = Counter((Lane(lane), tenant, explains) for _, _, lane, tenant, *_, explains in row.waiting or ())
    messages = [(Lane(lane), late) for _, lane, sent, late in row.dispatched or () if sent]
    return QueueSnapshot(
        waiting=[
            WaitingUnit(uuid.UUID(unit), Lane(lane), tenant, JobKind(kind), *rest, job_id=uuid.UUID(job))  # type: ignore[misc]
            for unit, job, lane, tenant, kind, *rest in sorted(row.waiting or (), key=lambda unit: unit[-1])
        ],
        dispatched=Counter(lane for lane, _ in messages),
        running=[RunningUnit(uuid.UUID(unit), Lane(lane), *rest) for unit, lane, *rest in row.running or ()],
        workers=[Worker(name, frozenset(map(Lane, lanes))) for name, lanes in row.workers or ()],
        late=Counter(lane for lane, late in messages if late),
        cut_off={(lane, tenant) for (lane, tenant, _), units in read.items() if units == row.share},
    )


MARK = """
UPDATE units SET state = 'dispatched', dispatched_at = clock_timestamp(), rings = {rings}
FROM (SELECT id FROM units WHERE {which} AND ({due}) IS TRUE FOR UPDATE SKIP LOCKED) AS chosen
WHERE units.id = chosen.id
RETURNING units.id, units.job_id, units.lane, units.tenant_id, units.kind, units.scans, explains IS NOT NULL AS explains
"""
LISTED = "id = ANY ($1)"
DUE = "state = 'queued' AND not_before <= clock_timestamp()"
OVERDUE = "dispatched_at < clock_timestamp() - make_interval(secs => $2 * least(power(2, rings - 1), 8))"
DISPATCH = PreparedStatement(
    "dispatch",
    "uuid[], float8",
    MARK.format(which=LISTED, rings="rings + 1", due=f"({DUE} OR state = 'dispatched' AND (rings = 0 OR {OVERDUE}))"),
)
RESERVE = PreparedStatement("reserve", "uuid[]", MARK.format(which=LISTED, rings="0", due=DUE))
# A unit without a kind is of an older release: the next look asks its job.
DISPATCH_NEW = PreparedStatement(
    "dispatch_new",
    "uuid, int, text[]",
    MARK.format(
        which="job_id = $1 AND ordinal = $2 AND lane = ANY ($3)",
        rings="rings + 1",
        due=f"{DUE} AND kind IS NOT NULL AND NOT {job_is(IS_CANCELLING, 'units')}",
    ),
)


def dispatch(session: Session, unit_ids: Iterable[uuid.UUID], redispatch_seconds: float) -> set[uuid.UUID]:
    """Mark units as dispatched and return those that were marked: publish their messages after the commit.

    A unit that nobody claims is dispatched again after `redispatch_seconds`, doubled each time up to 8 times that.
    Whether a unit is due is checked again here, and rows locked by another dispatcher are skipped, so that two
    dispatchers never send the same message.
    """
    return {uuid.UUID(str(row.id)) for row in DISPATCH(session, _array(unit_ids), redispatch_seconds)}


def dispatch_new(session: Session, job_id: str, ordinal: int, lanes: Iterable[Lane]) -> WaitingUnit | None:
    """Mark this unit as dispatched if it may be claimed and is in one of the lanes: publish its message after the
    commit."""
    row = DISPATCH_NEW(session, job_id, ordinal, _array(lanes)).first()
    if row is None:
        return None
    what = row.tenant_id, JobKind(row.kind), row.scans
    unit_id, its_job = uuid.UUID(str(row.id)), uuid.UUID(str(row.job_id))
    return WaitingUnit(unit_id, Lane(row.lane), *what, explains=row.explains, job_id=its_job)


def reserve(session: Session, unit_ids: Iterable[uuid.UUID]) -> None:
    """Leave units to busy workers that will be done soon."""
    RESERVE(session, _array(unit_ids))


def _array(values: Iterable[object]) -> str:
    """An array of ids, names or truth values as Postgres writes it."""
    return "{" + ",".join(json.dumps(str(value), ensure_ascii=False) for value in values) + "}"


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
