"""Figures for Prometheus: totals that are kept in tables, and the queue as it is now. No query reads all units.

A total of one tenant, or of all of them where the tenant is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.states import PREDICTIONS, Lane
from jobs.tables import JobCount, RequestCount, TenantLoad, UnitCount

LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds (s) of the classes in which requests are counted by their duration."""
WAITED = -1
"""The class of requests that waited for a job: their duration is what the client asked for."""
MOST_UNITS = 10_000
"""Where counting waiting units stops."""
LATEST_UNITS = 200
"""Units of a lane, of the last five minutes, that its times are taken from."""
QUANTILES = (0.5, 0.95)


# --- requests ---


@dataclass(frozen=True, order=True)
class RequestKind:
    """What requests are counted by. `bucket`: place of the duration among `LATENCY_BOUNDS`, or `WAITED`."""

    method: str
    route: str
    status: int
    bucket: int


def add_requests(session: Session, counts: Mapping[RequestKind, tuple[int, float]]) -> None:
    """Add requests to the totals: their number, and the sum of their durations (s)."""
    rows = [{**vars(kind), "requests": number, "seconds": took} for kind, (number, took) in sorted(counts.items())]
    if rows:  # sorted: two processes that add at the same time cannot deadlock
        new = insert(RequestCount).values(rows)
        both = {name: getattr(RequestCount, name) + new.excluded[name] for name in ("requests", "seconds")}
        key = ["method", "route", "status", "bucket"]
        session.execute(new.on_conflict_do_update(index_elements=key, set_=both))


def request_totals(session: Session) -> Sequence[RequestCount]:
    """All requests so far."""
    return session.scalars(select(RequestCount)).all()


# --- jobs and units that ended ---


def job_totals(session: Session, tenant_id: str | None) -> Sequence[Row[Any]]:
    """Ended jobs: kind, state, bucket (`jobs.queue.completion.QUEUE_BOUNDS`), jobs, succeeded, failed, cancelled (scans
    or units), queue_seconds, run_seconds."""
    names = ("jobs", "succeeded", "failed", "cancelled", "queue_seconds", "run_seconds")
    key = JobCount.kind, JobCount.state, JobCount.bucket
    found = select(*key, *(func.sum(getattr(JobCount, name)).label(name) for name in names)).group_by(*key)
    return session.execute(found if tenant_id is None else found.where(JobCount.tenant_id == tenant_id)).all()


def failure_totals(session: Session, tenant_id: str | None) -> Sequence[Row[str, str, int, int]]:
    """Failed attempts of units: kind, code, retried, ended."""
    key = UnitCount.kind, UnitCount.code
    sums = func.sum(UnitCount.retried).label("retried"), func.sum(UnitCount.ended).label("ended")
    found = select(*key, *sums).group_by(*key)
    return session.execute(found if tenant_id is None else found.where(UnitCount.tenant_id == tenant_id)).all()


# Of each tenant with work: an index has its running jobs, which are few, whatever the queue holds.
RUNNING_SCANS = text("""
SELECT coalesce(sum(done.succeeded), 0), coalesce(sum(done.failed), 0), coalesce(sum(done.cancelled), 0)
FROM tenant_loads CROSS JOIN LATERAL (
    SELECT sum(succeeded) AS succeeded, sum(failed) AS failed, sum(cancelled) AS cancelled FROM jobs
    WHERE jobs.tenant_id = tenant_loads.tenant_id AND state = 'running' AND kind IN ('predict', 'predict_batch')
) AS done
WHERE scans > 0 AND (CAST(:tenant AS text) IS NULL OR tenant_loads.tenant_id = :tenant)
""")


def scan_totals(session: Session, tenant_id: str | None, jobs: Sequence[Row[Any]]) -> dict[str, int]:
    """Predicted scans by state: those of ended jobs (`job_totals`), and of running ones so far."""
    running = session.execute(RUNNING_SCANS, {"tenant": tenant_id}).one()
    ended = [row for row in jobs if row.kind in set(map(str, PREDICTIONS))]
    states = zip(("succeeded", "failed", "cancelled"), running, strict=True)
    return {state: int(now) + sum(int(getattr(row, state)) for row in ended) for state, now in states}


# --- the queue now ---


def scans_in_queue(session: Session) -> int:
    """Scans of all jobs that have not ended; a training counts as one."""
    return int(session.scalar(select(func.coalesce(func.sum(TenantLoad.scans), 0))) or 0)


# Ordering by all columns of ix_units_claimable leaves the planner no other index, whatever it knows of the queue.
UNITS = text("""
SELECT lanes.name AS lane, 'waiting' AS state, (
    SELECT count(*) FROM (
        SELECT FROM units WHERE units.lane = lanes.name AND units.state IN ('queued', 'dispatched')
        ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal LIMIT :most
    ) AS waiting) AS units
FROM unnest(CAST(:lanes AS text[])) AS lanes(name)
UNION ALL
SELECT lane, 'running', count(*) FROM units WHERE state = 'running' GROUP BY lane
UNION ALL
SELECT lane, 'scheduled', count(*) FROM (
    SELECT lane FROM units WHERE state = 'scheduled' ORDER BY not_before LIMIT :most
) AS scheduled GROUP BY lane
""")


def unfinished_units(session: Session) -> dict[tuple[str, str], int]:
    """Units by lane and `waiting`, `running` or `scheduled`. `MOST_UNITS` means so many or more."""
    found = {(str(lane), state): 0 for lane in Lane for state in ("waiting", "running", "scheduled")}
    rows = session.execute(UNITS, {"lanes": list(map(str, Lane)), "most": MOST_UNITS})
    return found | {(row.lane, row.state): row.units for row in rows}


OLDEST = text("""
SELECT lanes.name, extract(epoch FROM clock_timestamp() - min(first.not_before))::float8
FROM unnest(CAST(:lanes AS text[])) AS lanes(name)
CROSS JOIN (SELECT tenant_id FROM tenant_loads WHERE scans > 0) AS tenants
CROSS JOIN (VALUES (false), (true)) AS kinds(explaining)
CROSS JOIN LATERAL (
    SELECT not_before FROM units
    WHERE units.lane = lanes.name AND units.tenant_id = tenants.tenant_id
        AND (explains IS NOT NULL) = kinds.explaining AND state IN ('queued', 'dispatched')
    ORDER BY lane, tenant_id, (explains IS NOT NULL), job_id, ordinal LIMIT 1
) AS first
GROUP BY lanes.name
""")


def oldest_ages(session: Session) -> dict[str, float]:
    """How long (s) each lane's oldest unit has been waiting: the first one of each tenant's oldest job is looked at."""
    rows = session.execute(OLDEST, {"lanes": list(map(str, Lane))})
    return {str(lane): 0.0 for lane in Lane} | {lane: max(0.0, age) for lane, age in rows}


@dataclass(frozen=True)
class UnitTimes:
    """Of a lane's latest units: quantiles (`QUANTILES`) of their time in the queue and of their duration (s)."""

    waits: Sequence[float]
    runs: Sequence[float]


TIMES = text("""
SELECT lanes.name,
    percentile_cont(CAST(:quantiles AS float8[])) WITHIN GROUP (ORDER BY latest.waited) AS waits,
    percentile_cont(CAST(:quantiles AS float8[])) WITHIN GROUP (ORDER BY latest.ran) AS runs
FROM unnest(CAST(:lanes AS text[])) AS lanes(name) CROSS JOIN LATERAL (
    SELECT greatest(extract(epoch FROM started_at - not_before), 0)::float8 AS waited,
        extract(epoch FROM finished_at - started_at)::float8 AS ran
    FROM units
    WHERE units.lane = lanes.name AND state = 'succeeded' AND finished_at > now() - interval '5 minutes'
    ORDER BY finished_at DESC LIMIT :most
) AS latest GROUP BY lanes.name
""")


def unit_times(session: Session) -> dict[str, UnitTimes]:
    """The times of each lane that a unit has succeeded in during the last five minutes."""
    given = {"lanes": list(map(str, Lane)), "quantiles": list(QUANTILES), "most": LATEST_UNITS}
    return {lane: UnitTimes(waits, runs) for lane, waits, runs in session.execute(TIMES, given)}


SCANS = text("""
SELECT lanes.name, coalesce((
    SELECT sum(scans) FROM units
    WHERE units.lane = lanes.name AND state = 'succeeded' AND finished_at > now() - interval '1 minute'
        AND explains IS NULL
), 0) / 60.0::float8
FROM unnest(CAST(:lanes AS text[])) AS lanes(name)
""")


def scans_per_second(session: Session) -> dict[str, float]:
    """Scans in units that succeeded during the last minute, by lane. A training counts as one."""
    return {lane: float(rate) for lane, rate in session.execute(SCANS, {"lanes": list(map(str, Lane))})}
