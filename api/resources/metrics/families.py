"""The metrics: names, labels and meaning. docs/metrics.md has the same, and a test compares them.

Names follow https://prometheus.io/docs/practices/naming/. `renalq_…` is about the tenant of the key, `renalq_stack_…`
about all tenants.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

Labels = tuple[str, ...]
Values = Mapping[Any, float]
"""Values of a gauge or counter by the values of its labels."""


class Kind(StrEnum):
    """Prometheus' types of metrics."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Family:
    """A metric."""

    name: str
    kind: Kind
    help: str
    labels: Labels = ()


@dataclass(frozen=True)
class Histogram:
    """Durations by class, each with its upper bound; those above all bounds come last.

    Args:
        counts: one more than there are bounds.
        total: sum of all durations (s).
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        return list(zip([*map(str, self.bounds), "+Inf"], accumulate(self.counts), strict=True))


def histogram(bounds: Sequence[float], rows: Iterable[tuple[int, int, float]]) -> Histogram:
    """From rows of class, number and sum."""
    counts, total = [0] * (len(bounds) + 1), 0.0
    for bucket, number, took in rows:
        counts[bucket] += int(number)
        total += took
    return Histogram(bounds, counts, total)


@dataclass(frozen=True)
class Metric:
    """A family with its values."""

    family: Family
    values: Values | Mapping[Any, Histogram]


G, C, H = Kind.GAUGE, Kind.COUNTER, Kind.HISTOGRAM

JOBS = Family("renalq_jobs", G, "Jobs that have not ended.", ("state",))
UNITS = Family("renalq_units", G, "Units of work that have not ended.", ("state",))
JOBS_ENDED = Family("renalq_jobs_ended_total", C, "Jobs that have ended.", ("kind", "state"))
JOB_QUEUE = Family("renalq_job_queue_seconds", H, "Time from submission to the first claim of ended jobs.", ("kind",))
JOB_RUN = Family("renalq_job_run_seconds_total", C, "Time from first claim to end, of ended jobs.", ("kind",))
SCANS = Family("renalq_scans_total", C, "Scans of predictions that have ended.", ("state",))
RETRIES = Family("renalq_unit_retries_total", C, "Failed attempts that were queued again.", ("kind", "code"))
FAILURES = Family("renalq_unit_failures_total", C, "Units that have failed for good.", ("kind", "code"))
STORAGE = Family("renalq_storage_bytes", G, "Stored bytes that count for the quota.", ("kind",))
QUOTA = Family("renalq_storage_quota_bytes", G, "The quota; missing if there is none.")
CHAMPION = Family("renalq_champion_version", G, "Version of the champion.")
DRIFT_PSI = Family("renalq_drift_psi", G, "Population stability index of the latest day.", ("model", "figure"))
DRIFT_LIMIT = Family("renalq_drift_limit", G, "Index above which a figure has drifted.", ("model", "figure"))
REJECTED = Family("renalq_rejected_share", G, "Share of scans of the latest day that were rejected.", ("model",))
ACCURACY = Family("renalq_model_accuracy", G, "Share of correct predictions with feedback, 30 days.", ("model",))

REQUESTS = Family("renalq_stack_http_requests_total", C, "Requests to the API.", ("method", "route", "status"))
LATENCY = Family(
    "renalq_stack_http_request_duration_seconds", H, "Until the response begins; without requests that wait.",
    ("method", "route"),
)  # fmt: skip
STACK_JOBS_ENDED = Family("renalq_stack_jobs_ended_total", C, "Jobs that have ended.", ("kind", "state"))
STACK_JOB_QUEUE = Family(
    "renalq_stack_job_queue_seconds", H, "Time from submission to the first claim of ended jobs.", ("kind",)
)
STACK_JOB_RUN = Family(
    "renalq_stack_job_run_seconds_total", C, "Time from first claim to end, of ended jobs.", ("kind",)
)
STACK_SCANS = Family("renalq_stack_scans_total", C, "Scans of predictions that have ended.", ("state",))
STACK_RATE = Family("renalq_stack_scans_per_second", G, "Scans in units that succeeded in the last minute.", ("lane",))
STACK_RETRIES = Family(
    "renalq_stack_unit_retries_total", C, "Failed attempts that were queued again.", ("kind", "code")
)
STACK_FAILURES = Family("renalq_stack_unit_failures_total", C, "Units that have failed for good.", ("kind", "code"))
LEASES_LOST = Family(
    "renalq_stack_leases_lost_total", C, "Units taken back from a worker that died or stalled.", ("kind", "code")
)
QUEUE = Family("renalq_stack_queue_scans", G, "Scans of jobs that have not ended; a training counts as one.")
STACK_UNITS = Family(
    "renalq_stack_units", G, "Units that have not ended; 10000 waiting ones mean 10000 or more.", ("lane", "state")
)
OLDEST = Family("renalq_stack_oldest_unit_seconds", G, "Age of the lane's oldest waiting unit.", ("lane",))
UNIT_WAIT = Family(
    "renalq_stack_unit_wait_seconds", G, "Time in the queue of the lane's latest units.", ("lane", "quantile")
)
UNIT_RUN = Family("renalq_stack_unit_run_seconds", G, "Duration of the lane's latest units.", ("lane", "quantile"))
WORKERS = Family("renalq_stack_workers", G, "Live workers that serve a lane.", ("lane", "device"))
DISPATCHERS = Family("renalq_stack_dispatchers", G, "Live dispatchers.", ("broker",))
STACK_STORAGE = Family("renalq_stack_storage_bytes", G, "Stored bytes that count for quotas.", ("kind",))
DISK_FREE = Family("renalq_stack_disk_free_bytes", G, "Free space of the disk with this folder.", ("folder",))
DISK_SIZE = Family("renalq_stack_disk_size_bytes", G, "Size of the disk with this folder.", ("folder",))

FAMILIES = tuple(found for found in list(globals().values()) if isinstance(found, Family))
"""All of them."""
