"""The services of retention, for the maintenance of the leading dispatcher."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jobs.db import Sessions
from jobs.retention import blobs, checkpoints, deletions, feedback, jobs, local, results, study_counts
from jobs.retention.orphans import OrphanSweep
from jobs.retention.scans import ScanSweep
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore

SOON, MINUTE, TEN_MINUTES, DAY = 2.0, 60.0, 600.0, 24 * 3600.0


class RetentionService(NamedTuple):
    """`step()` does a bounded batch, in short transactions of its own; True: there is more. Run it each `seconds`."""

    name: str
    seconds: float
    step: Callable[[], bool]


def services(sessions: Sessions, store: BlobStore, settings: Settings) -> list[RetentionService]:
    """All services. One whose setting is 0 does nothing."""
    steps = {
        "delete_on_request": (SOON, deletions.step),
        "expire_results": (TEN_MINUTES, results.step),
        "delete_jobs": (TEN_MINUTES, jobs.step),
        "delete_feedback": (TEN_MINUTES, feedback.step),
        "delete_scans": (TEN_MINUTES, ScanSweep().step),
        "delete_study_counts": (TEN_MINUTES, study_counts.step),
        "delete_checkpoints": (TEN_MINUTES, checkpoints.step),
        "delete_blobs": (min(MINUTE, settings.deletion_grace_seconds / 4), blobs.step),
        "delete_local_files": (TEN_MINUTES, _sweep_local),
        "find_orphans": (DAY, OrphanSweep().step),
    }
    return [
        RetentionService(name, every, partial(step, sessions, store, settings)) for name, (every, step) in steps.items()
    ]


def _sweep_local(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    return local.sweep(sessions, settings)
