"""The figures of the whole stack, for operators: requests, queue, workers, disks."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy.orm import Session

from api.http.context import services
from api.resources.health import LEAST_SECONDS
from api.resources.metrics import ended, families
from api.resources.metrics.families import Family, Metric, histogram
from jobs import monitoring
from jobs.monitoring import LATENCY_BOUNDS, QUANTILES, WAITED
from jobs.queue import processes
from jobs.queue.reaping import STALLED, WORKER_LOST
from jobs.storage import usage

LOST = (WORKER_LOST["code"], STALLED["code"])


def stack_metrics(session: Session) -> Iterator[Metric]:
    """All of them."""
    yield from _requests(session)
    yield from ended.ended(session, ended.STACK, None)
    yield from _leases(session)
    yield from _queue(session)
    yield from _processes(session)
    yield Metric(families.STACK_STORAGE, {(kind,): size for kind, size in usage.usage_of_all(session).items()})
    yield from _disks()


def _requests(session: Session) -> Iterator[Metric]:
    rows = monitoring.request_totals(session)
    numbers: Counter[tuple[str, ...]] = Counter()
    took: dict[tuple[str, ...], list[tuple[int, int, float]]] = {}
    for row in rows:
        numbers[row.method, row.route, str(row.status)] += row.requests
        if row.bucket != WAITED:
            took.setdefault((row.method, row.route), []).append((row.bucket, row.requests, row.seconds))
    yield Metric(families.REQUESTS, dict(numbers))
    yield Metric(families.LATENCY, {route: histogram(LATENCY_BOUNDS, found) for route, found in took.items()})


def _leases(session: Session) -> Iterator[Metric]:
    lost = [row for row in monitoring.failure_totals(session, None) if row.code in LOST]
    yield Metric(families.LEASES_LOST, {(row.kind, row.code): int(row.retried + row.ended) for row in lost})


def _queue(session: Session) -> Iterator[Metric]:
    yield Metric(families.QUEUE, {(): monitoring.scans_in_queue(session)})
    yield Metric(families.STACK_UNITS, monitoring.unfinished_units(session))
    yield Metric(families.OLDEST, {(lane,): age for lane, age in monitoring.oldest_ages(session).items()})
    yield Metric(families.STACK_RATE, {(lane,): rate for lane, rate in monitoring.scans_per_second(session).items()})
    times = monitoring.unit_times(session)
    yield _quantiles(families.UNIT_WAIT, {lane: found.waits for lane, found in times.items()})
    yield _quantiles(families.UNIT_RUN, {lane: found.runs for lane, found in times.items()})


def _quantiles(family: Family, by_lane: dict[str, Sequence[float]]) -> Metric:
    pairs = ((lane, zip(QUANTILES, found, strict=True)) for lane, found in by_lane.items())
    return Metric(family, {(lane, str(quantile)): value for lane, found in pairs for quantile, value in found})


def _processes(session: Session) -> Iterator[Metric]:
    alive = processes.list_alive(session, max(LEAST_SECONDS, 3 * services().settings.process_seconds))
    workers = Counter(
        (lane, one.device or "unknown") for one in alive if one.kind == processes.WORKER for lane in one.lanes
    )
    dispatchers = Counter(
        ("reached" if one.broker_reachable else "unreachable",) for one in alive if one.kind == processes.DISPATCHER
    )
    yield Metric(families.WORKERS, dict(workers))
    yield Metric(families.DISPATCHERS, {("reached",): 0, ("unreachable",): 0} | dict(dispatchers))


def _disks() -> Iterator[Metric]:
    settings = services().settings
    folders = {"home": settings.home, "artifacts": Path(settings.artifacts)}
    found = {(name,): shutil.disk_usage(path) for name, path in folders.items() if path.is_dir()}
    yield Metric(families.DISK_FREE, {name: disk.free for name, disk in found.items()})
    yield Metric(families.DISK_SIZE, {name: disk.total for name, disk in found.items()})
