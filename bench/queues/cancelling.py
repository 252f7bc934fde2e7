"""Cancelling batches of so many scans: the request, and until all has ended."""

from __future__ import annotations

import time
from statistics import median

from sqlalchemy import text

from bench.queues.checkouts import Figures, say
from bench.queues.databases import Backend, migrated
from bench.queues.product import end_cancelled
from jobs.db import Sessions, session_factory
from jobs.queue import lifecycle

CHUNK, TENANT = 128, "tenant-0"
FILL = (
    "SET LOCAL session_replication_role = replica",
    """INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)
        SELECT uuidv7(), :tenant, 'predict_batch', 'batch', 'queued', '{}', '{}', :scans
        FROM generate_series(1, :batches)""",
    """INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings, scans)
        SELECT uuidv7(), tenant_id, jobs.id, n, 'batch', 'queued', 0, 0, 0, :chunk
        FROM jobs CROSS JOIN LATERAL generate_series(0, (total - 1) / :chunk) AS n WHERE total = :scans""",
    """INSERT INTO scan_results (job_id, ordinal, tenant_id, unit_id, scan_id, name, state)
        SELECT jobs.id, n, jobs.tenant_id, units.id, uuidv7(), n || '.dcm', 'pending'
        FROM jobs CROSS JOIN LATERAL generate_series(0, total - 1) AS n
            JOIN units ON units.job_id = jobs.id AND units.ordinal = n / :chunk WHERE total = :scans""",
    """INSERT INTO tenant_loads (tenant_id, scans, batches) VALUES (:tenant, :scans * :batches, :batches)
        ON CONFLICT (tenant_id) DO UPDATE SET scans = tenant_loads.scans + excluded.scans,
            batches = tenant_loads.batches + excluded.batches""",
)


def cancel(server: str, sizes: tuple[int, int], batches: int) -> Figures:
    """For each size: medians (ms) of the request, and until the job has ended; on the clock and of the processors."""
    sessions = session_factory(migrated(server, "cancel"), 1, "bench")
    backend = Backend(sessions.kw["bind"])
    jobs = {size: _filled(sessions, size, batches) for size in sizes}
    with sessions.kw["bind"].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for number in range(batches):
        for size in sizes:
            say(f"cancel a batch of {size:,} scans")
            found[size].append(_cancelled(sessions, backend, jobs[size][number]))
    sessions.kw["bind"].dispose()
    return {
        str(size): {name: round(median(taken[name] for taken in each), 1) for name in each[0]}
        for size, each in found.items()
    }


def _filled(sessions: Sessions, scans: int, batches: int) -> list[str]:
    numbers = {"tenant": TENANT, "scans": scans, "batches": batches, "chunk": CHUNK}
    with sessions.begin() as session:
        for statement in FILL:
            session.execute(text(statement), {k: v for k, v in numbers.items() if f":{k}" in statement})
        return list(session.scalars(text("SELECT id FROM jobs WHERE total = :scans"), {"scans": scans}))


def _cancelled(sessions: Sessions, backend: Backend, job_id: str) -> dict[str, float]:
    started, cpu = time.perf_counter(), backend.cpu_ms()
    with sessions.begin() as session:
        lifecycle.cancel(session, TENANT, job_id)  # type: ignore[arg-type]
    request = {"request_ms": (time.perf_counter() - started) * 1e3, "request_cpu_ms": backend.cpu_ms() - cpu}
    while not _has_ended(sessions, job_id):
        with sessions.begin() as session:
            end_cancelled(session)
    ended = {"until_ended_ms": (time.perf_counter() - started) * 1e3, "until_ended_cpu_ms": backend.cpu_ms() - cpu}
    return request | ended


def _has_ended(sessions: Sessions, job_id: str) -> bool:
    with sessions() as session:
        return bool(session.scalar(text("SELECT finished_at IS NOT NULL FROM jobs WHERE id = :id"), {"id": job_id}))
