"""A queue under load while somebody holds a snapshot open; and which updates are HOT.

While a snapshot is open, no row that it sees can be removed: each update leaves a dead version, and indexes keep the
entries of all that has ended since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psycopg2
from sqlalchemy import text
from sqlalchemy.engine import make_url

from bench.queues.checkouts import Figures, say
from bench.queues.databases import written
from bench.queues.filled import LEASE_SECONDS, TENANT, WORKER, Queue
from jobs.queue import dispatch, leases, lifecycle
from jobs.queue.leases import Claim
from jobs.results import queries

TABLES = ("units", "jobs", "job_events")
UNITS_PER_SECOND, LOOKS_PER_SECOND, REPORTS = 10, 3, 2
"""Of a hundred workers with units of ten seconds; a predicting worker reports five times a unit in fact."""
HOT_UNITS = 200
BATCH = "SELECT id, job_id FROM units WHERE job_id = (SELECT id FROM jobs ORDER BY total DESC LIMIT 1) LIMIT :count"


def hot_shares(queue: Queue) -> Figures:
    """For each verb: rows updated in each table, and the share of them that was HOT; and by how much the revision of
    the job moved. On units of a running batch, as most are."""
    with queue.sessions() as session:
        rows = session.execute(text(BATCH), {"count": HOT_UNITS + 1}).all()
    ids, job_id = [row.id for row in rows], rows[0].job_id
    held: list[Claim] = []
    _claim(queue, ids.pop(), held)  # its job runs from now on
    held.clear()
    return {
        "claim": _hot(queue, job_id, lambda: [_claim(queue, unit_id, held) for unit_id in ids]),
        "beat": _hot(queue, job_id, lambda: _each(queue, held, lambda s, unit: leases.beat(s, unit, LEASE_SECONDS))),
        "report": _hot(queue, job_id, lambda: _each(queue, held, lifecycle.report)),
        "end": _hot(queue, job_id, lambda: _each(queue, held, lifecycle.succeed)),
    }


def _claim(queue: Queue, unit_id: Any, held: list[Claim]) -> None:
    with queue.single.begin() as session:
        claimed = leases.claim(session, unit_id, WORKER, LEASE_SECONDS)
    assert claimed is not None
    held.append(claimed)


def _each(queue: Queue, held: list[Claim], verb: Callable[..., Any]) -> None:
    for claimed in held:
        with queue.sessions.begin() as session:
            verb(session, claimed)


def _hot(queue: Queue, job_id: Any, work: Callable[[], object]) -> Figures:
    before, revision = _state(queue, job_id)
    work()
    after, now = _state(queue, job_id)
    found: Figures = {"job_revisions": now - revision}
    for table in TABLES:
        updated, hot = (after[table][name] - before[table][name] for name in ("updated", "hot"))
        if updated:
            found[table] = {"updated": updated, "hot": round(hot / updated, 3)}
    return found


def _state(queue: Queue, job_id: Any) -> tuple[dict[str, dict[str, int]], int]:
    for sessions in (queue.single, queue.sessions):  # both have written
        with sessions() as session:
            found = written(session.connection(), *TABLES)
    with queue.sessions() as session:
        revision = session.scalar(text("SELECT revision FROM jobs WHERE id = :id"), {"id": job_id})
    return found, int(revision or 0)


def load(queue: Queue, minutes: float) -> Figures:
    """What a hundred workers and their dispatcher ask in so many minutes, one after the other, as fast as it goes.

    Processor times of each tenth of it (medians, ms), all while a snapshot from its start is open, and pages touched at
    its start and its end; then without it, after a VACUUM.
    """
    queue.vacuum()
    tenths: list[dict[str, float]] = []
    with held_snapshot(queue.url):
        pages = {"first": queue.pages_touched(lambda: _second(queue), 3)}
        for tenth in range(10):
            say(f"load with an open snapshot: {tenth + 1}/10")
            tenths.append(_cpu(queue, max(1, round(minutes * 6))))
        pages["last"] = queue.pages_touched(lambda: _second(queue), 3)
        with queue.sessions() as session:
            found = written(session.connection(), *TABLES)
    queue.vacuum()
    return {
        "simulated_minutes": minutes,
        "per_second": {"units": UNITS_PER_SECOND, "looks": LOOKS_PER_SECOND, "reports": REPORTS * UNITS_PER_SECOND},
        "tables": found,
        "cpu_ms_by_tenth": {name: [tenth[name] for tenth in tenths] for name in tenths[0]},
        "last_to_first": {name: round(tenths[-1][name] / tenths[0][name], 2) for name in tenths[0]},
        "pages": pages,
        "vacuumed": _cpu(queue, 5),
    }


def _cpu(queue: Queue, seconds: int) -> dict[str, float]:
    found = queue.measure(lambda: _second(queue), seconds)
    return {name: round(median(costs.cpu_ms), 3) for name, costs in found.items()}


def _second(queue: Queue) -> None:
    for _ in range(LOOKS_PER_SECOND):
        plan = queue.timed("look", queue.planner.look, queue.single)
    ids = [unit.unit_id for unit in plan.dispatch][:UNITS_PER_SECOND]
    with queue.single.begin() as session:
        dispatch.dispatch(session, ids, 15)
    queue.planner.marked(ids)
    for unit_id in ids:
        queue.work(unit_id, REPORTS)
    queue.timed("poll", lambda session: queries.job(session, TENANT, queue.deep[0]), queue.sessions)


@contextmanager
def held_snapshot(url: str) -> Iterator[None]:
    """A transaction of somebody else that sees the database as it is now, for the length of the block."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(plain)
    try:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        connection.cursor().execute("SELECT count(*) FROM processes")
        yield
    finally:
        connection.close()
