"""Totals of what has ended: jobs, scans, failed attempts; of one tenant, or of all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.resources.metrics import families
from api.resources.metrics.families import Family, Metric, histogram
from jobs import monitoring
from jobs.queue.completion import QUEUE_BOUNDS


@dataclass(frozen=True)
class Names:
    """The families of one tenant, or those of the stack."""

    jobs: Family
    queue: Family
    run: Family
    scans: Family
    retries: Family
    failures: Family


TENANT = Names(
    families.JOBS_ENDED, families.JOB_QUEUE, families.JOB_RUN, families.SCANS, families.RETRIES, families.FAILURES
)
STACK = Names(
    families.STACK_JOBS_ENDED, families.STACK_JOB_QUEUE, families.STACK_JOB_RUN, families.STACK_SCANS,
    families.STACK_RETRIES, families.STACK_FAILURES,
)  # fmt: skip


def ended(session: Session, names: Names, tenant_id: str | None) -> Iterator[Metric]:
    """The totals of a tenant; None: of all."""
    jobs = monitoring.job_totals(session, tenant_id)
    yield Metric(names.jobs, _sums(jobs, ("kind", "state"), "jobs"))
    kinds = sorted({row.kind for row in jobs})
    waits = {(kind,): [(row.bucket, row.jobs, row.queue_seconds) for row in jobs if row.kind == kind] for kind in kinds}
    yield Metric(names.queue, {kind: histogram(QUEUE_BOUNDS, rows) for kind, rows in waits.items()})
    yield Metric(names.run, _sums(jobs, ("kind",), "run_seconds"))
    scans = monitoring.scan_totals(session, tenant_id, jobs)
    yield Metric(names.scans, {(state,): number for state, number in scans.items()})
    failures = monitoring.failure_totals(session, tenant_id)
    yield Metric(names.retries, _sums(failures, ("kind", "code"), "retried"))
    yield Metric(names.failures, _sums(failures, ("kind", "code"), "ended"))


def _sums(rows: Sequence[Any], labels: Sequence[str], value: str) -> dict[tuple[str, ...], float]:
    found: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        found[tuple(getattr(row, label) for label in labels)] += float(getattr(row, value))  # type: ignore[assignment]
    return dict(found)
