"""Builders: rows as the verbs make them, in the state that a test asks for. Nothing here writes a state by hand."""

import datetime as dt
import os
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.models import promotion, registry
from jobs.models.comparison import PairedScores
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import leases, lifecycle
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.settings import Settings
from jobs.stack_state import ServiceState, ServiceStatus, StackState
from jobs.states import JobKind, JobState, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Dataset, Job, Json, ModelVersion, Scan, ScanResult, Unit, new_id

TENANT = "default"
LANES = {
    JobKind.TRAIN: Lane.TRAIN,
    JobKind.INGEST: Lane.BATCH,
    JobKind.PREDICT: Lane.URGENT,
    JobKind.PREDICT_BATCH: Lane.BATCH,
}
BROKEN = {"code": "BROKEN", "detail": "It broke.", "retryable": False}
SCORES: Json = {
    "f1": 0.97, "recall": 0.96, "ece": 0.04, "ece_chance": 0.03, "intervals": {"recall": [0.86, 0.99]},
    "positive": "Tumor", "independent_per_class": {"Normal": 48, "Tumor": 45},
}  # fmt: skip
"""Metrics that the gate takes for a first champion."""
TRANSIENT = {"code": "SHAKY", "detail": "Try again.", "retryable": True}


def paired(ours: float | None, theirs: float | None, reach: float = 0.03) -> Json:
    """The paired tests of two networks with these F1; `reach`: half of the width of the difference's interval."""
    if ours is None or theirs is None:
        return {"groups": 60, "differences": {}, "mcnemar": {"statistic": 0.0, "p": 1.0}, "delong": None}
    gap = ours - theirs
    f1 = {"ours": ours, "theirs": theirs, "difference": gap, "low": gap - reach, "high": gap + reach}
    return {"groups": 60, "differences": {"f1": f1}, "mcnemar": {"statistic": 0.5, "p": 0.48}, "delong": None}


WEIGHTS = "a" * 64
"""The file of versions that tests make."""


def store_weights(settings: Settings, sha256: str = WEIGHTS) -> Path:
    """Put something where the store keeps the file of a version: it takes a hash at its word."""
    path = BlobStore(settings.artifacts).fetch(sha256, settings.home)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def stored_files(settings: Settings) -> list[Path]:
    """The files in the store, but for the one of `store_weights`."""
    found = (settings.home / "artifacts").rglob("*")
    return [path for path in found if path.is_file() and path.name not in WEIGHTS]


def make_scan(session: Session, tenant_id: str = TENANT, sha256: str | None = None) -> Scan:
    """A stored scan's row (no blob behind it)."""
    scan = Scan(
        tenant_id=tenant_id,
        sha256=sha256 or uuid.uuid4().hex * 2,
        size=1000,
        media_type="image/png",
        width=512,
        height=512,
    )
    session.add(scan)
    session.flush()
    return scan


def make_dataset(session: Session, tenant_id: str = TENANT, state: str = "ready") -> Dataset:
    """A dataset's row (no blob behind it)."""
    dataset = Dataset(
        tenant_id=tenant_id,
        name="kidneys",
        state=state,
        archive_sha256=uuid.uuid4().hex * 2,
        archive_bytes=1000,
        digest=uuid.uuid4().hex * 2 if state == "ready" else None,
        classes={"Normal": 240, "Tumor": 225},
    )
    session.add(dataset)
    session.flush()
    return dataset


def make_job(
    session: Session,
    kind: JobKind = JobKind.TRAIN,
    state: JobState = JobState.QUEUED,
    scans: int = 0,
    chunk: int = 10,
    tenant_id: str = TENANT,
    **new: Any,
) -> Job:
    """A job, moved on by real verbs until it is in the asked state. A training needs no weights of live workers."""
    if kind == JobKind.TRAIN:
        new = {"params": {"weights": "none"}, **new}
    results = [NewResult(make_scan(session, tenant_id).id, name=f"{i}.png") for i in range(scans)]
    job = submit(session, NewJob(tenant_id, kind, LANES[kind], **new), results, chunk)
    if state == JobState.QUEUED:
        return job
    if state == JobState.CANCELLED:
        return lifecycle.cancel(session, tenant_id, job.id)
    for unit in units_of(session, job):
        held = claim(session, unit)
        if state == JobState.SUCCEEDED:
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
        elif state == JobState.FAILED:
            lifecycle.fail(session, held, BROKEN)
    session.refresh(job)
    return job


def units_of(session: Session, job: Job) -> list[Unit]:
    """The job's units, first first."""
    session.expire_all()
    return list(session.scalars(select(Unit).where(Unit.job_id == job.id).order_by(Unit.ordinal)))


def claim(session: Session, unit: Unit, worker: str = "worker-a", lease: float = 45) -> Claim:
    """The unit, claimed; a refusal is a failed test."""
    held = leases.claim(session, unit.id, worker, lease)
    assert held is not None
    return held


def outcomes_of(session: Session, held: Claim, failed: int = 0, engine: str = "torch-fp32") -> list[ScanOutcome]:
    """An outcome for each scan of the unit, of which the first `failed` could not be read."""
    ordinals = session.scalars(
        select(ScanResult.ordinal).where(ScanResult.unit_id == held.unit_id).order_by(ScanResult.ordinal)
    ).all()
    good = {"label": "Tumor", "confidence": 0.9, "probabilities": {"Normal": 0.1, "Tumor": 0.9}, "engine": engine}
    good |= {"disposition": "tumor", "ood_score": 0.4}
    return [
        ScanOutcome(ordinal, error=BROKEN) if number < failed else ScanOutcome(ordinal, **good)
        for number, ordinal in enumerate(ordinals)
    ]


def unknown_id() -> uuid.UUID:
    """An id that nothing has."""
    return new_id()


def make_model(
    session: Session, scores: Json | None = None, tenant_id: str = TENANT, dataset: Dataset | None = None, **new: Any
) -> ModelVersion:
    """A version as its training's end leaves it, scored beside the champion on the same scans where there is one."""
    metrics = {**SCORES, **(scores or {})}
    job = make_job(session, tenant_id=tenant_id, dataset_id=dataset.id if dataset else None)
    held = claim(session, units_of(session, job)[0])
    champion = registry.find_champion(session, tenant_id)
    measured = None
    if champion:
        tests = paired(metrics["f1"], champion.metrics["f1"])
        measured = PairedScores(champion.id, "", "c" * 64, 93, metrics, champion.metrics, tests)
    given = {"classes": ["Normal", "Tumor"], "params": {}, "dataset_digest": "d" * 64, "code_revision": "abc"}
    made = NewModel(**{"weights_sha256": WEIGHTS, "metrics": metrics, **given, **new})
    version = promotion.register(session, held, made, GatePolicy(), measured)
    lifecycle.succeed(session, held, metrics=metrics)
    return version


def service(name: str, state: ServiceState, essential: bool = False, last_death: str = "") -> ServiceStatus:
    """A process of `renalq up` that is in this state since now."""
    since = dt.datetime.now(dt.UTC)
    return ServiceStatus(name=name, state=state, since=since, essential=essential, pid=1, last_death=last_death)


def stack(*services: ServiceStatus, ready: bool = True, pid: int | None = None) -> StackState:
    """What `renalq up` says of itself; by default this process is it."""
    return StackState(
        ready=ready, pid=pid or os.getpid(), port=8080, addresses={}, pids={}, logs="logs", services=list(services)
    )
