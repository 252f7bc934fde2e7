"""Case 52: nights come and go, and with retention neither rows nor files are left of them."""

import io
import os
from pathlib import Path

from sqlalchemy import func, select, update

from jobs.db import Base, Sessions, seconds
from jobs.models import feedback
from jobs.queue import explanations, lifecycle
from jobs.results import queries
from jobs.retention.blobs import GRACE_SECONDS
from jobs.retention.services import services
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Checkpoint, ModelVersion, ReleasedBlob, Scan
from tests import builders

LIMITS = ("results_days", "job_days", "scan_days", "feedback_days", "checkpoint_days", "orphan_days")
SOON = 1e-9
"""Retention time (days) that all is over."""


def night(sessions: Sessions, store: BlobStore, model: ModelVersion) -> None:
    """A batch with an explanation and feedback; a training that failed after its checkpoint; a writer that died."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=2, model_id=model.id)
        for scan in session.scalars(select(Scan)):
            scan.sha256 = store.put(io.BytesIO(os.urandom(9))).sha256
        session.flush()
        for unit in builders.units_of(session, job):
            held = builders.claim(session, unit)
            lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
        named = [(explanations.artifact_name(0), store.put(io.BytesIO(os.urandom(9))))]
        explanations.insert_artifacts(session, held, named)
        view = queries.job(session, builders.TENANT, job.id)
        feedback.record(session, view, queries.results(session, view).data[0].scan_id, "Tumor")
        failed = builders.make_job(session, state=JobState.FAILED).id
        file = {"tenant_id": builders.TENANT, "sha256": "a" * 64, "size": 1, "path": "1-1.safetensors"}
        session.add(Checkpoint(job_id=failed, fence=1, epoch=1, **file))
    Path(store._root, "checkpoints", str(failed)).mkdir(parents=True)
    store.put(io.BytesIO(os.urandom(9)))


def day(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    """All services until they have no more to do; then an hour passes for files, and once more."""
    for _ in range(3):
        for service in services(sessions, store, settings):
            while service.step():
                pass
        with sessions.begin() as session:
            session.execute(update(ReleasedBlob).values(due_at=ReleasedBlob.due_at - seconds(GRACE_SECONDS)))


def rows(sessions: Sessions) -> dict[str, int]:
    with sessions() as session:
        tables = Base.metadata.tables.items()
        return {name: session.scalar(select(func.count()).select_from(table)) or 0 for name, table in tables}


def files(settings: Settings) -> list[Path]:
    return [path for path in Path(settings.artifacts).rglob("*") if path.is_file() or path.parent.name == "checkpoints"]


def test_nights_leave_nothing_behind(sessions: Sessions, settings: Settings) -> None:
    store = BlobStore(settings.artifacts)
    with sessions.begin() as session:
        model = builders.make_model(session, weights_sha256=store.put(io.BytesIO(b"weights")).sha256)
    before = rows(sessions), files(settings)
    totals = []
    for _ in range(3):
        night(sessions, store, model)
        assert len(files(settings)) == len(before[1]) + 6
        day(sessions, store, settings.model_copy(update=dict.fromkeys(LIMITS, SOON)))
        after = rows(sessions), files(settings)
        counts = {name: after[0][name] - before[0][name] for name in after[0] if after[0][name] != before[0][name]}
        assert counts.keys() <= {"prediction_counts", "job_counts", "unit_counts", "storage_changes"}
        # Changes of storage are folded when they are many (tests/api/test_storage_quota.py).
        totals.append({name: count for name, count in counts.items() if name != "storage_changes"})
        assert after[1] == before[1]
    assert totals[0] == totals[2], "totals by kind and day, which no job adds to"


def test_by_default_jobs_results_scans_and_feedback_are_kept(sessions: Sessions, settings: Settings) -> None:
    store = BlobStore(settings.artifacts)
    with sessions.begin() as session:
        model = builders.make_model(session)
    night(sessions, store, model)
    before = rows(sessions)
    day(sessions, store, settings)
    kept = rows(sessions)
    assert {name: number for name, number in kept.items() if number != before[name]} == {"released_blobs": 1}
