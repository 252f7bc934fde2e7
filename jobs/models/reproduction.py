"""Reproduce a training: submit it again with the same data, parameters and seed, and compare the metrics at its end."""

import uuid
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.datasets import catalog
from jobs.errors import DatasetGone, DatasetNotFound, JobNotFound, WrongState
from jobs.events.job_events import record
from jobs.queue import submission
from jobs.queue.leases import Claim
from jobs.queue.submission import UNLIMITED, NewJob, Quota, submit
from jobs.states import JobKind, JobState, Lane
from jobs.tables import Job, Json, ModelVersion
from ml.spec.registry import spec_of

TOLERANCE = 1e-6
"""The difference up to which two metrics match."""
DIRTY_SUFFIX = "+changed"
"""Suffix of the revision of a checkout with uncommitted changes: two of them never count as the same code."""


def reproduce(
    session: Session,
    tenant_id: str,
    job_id: uuid.UUID,
    quota: Quota = UNLIMITED,
    created_by: uuid.UUID | None = None,
    idempotency_key: str | None = None,
) -> Job:
    """Submit a succeeded training again with the same dataset, complete parameters and seed. It is never promoted.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: it is not a training, or has not succeeded.
        DatasetGone: its dataset was deleted.
        QuotaExceeded, QueueFull
    """
    old = session.scalar(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id))
    if old is None:
        raise JobNotFound
    if old.kind != JobKind.TRAIN:
        raise WrongState(f"Only a training can be reproduced, and this is a {old.kind} job.")
    if old.state != JobState.SUCCEEDED:
        raise WrongState(state=old.state, verb="reproducing", allowed=str(JobState.SUCCEEDED))
    _require_data(session, old)
    submission.require_version(session, old)
    again = NewJob(
        tenant_id=tenant_id,
        kind=JobKind.TRAIN,
        pipeline=old.pipeline,
        task=old.task,
        lane=Lane(old.lane),
        name=old.name,
        params=spec_of(old.pipeline).stored.current(_params_of(session, old.id, old.params)),
        metadata=old.labels,
        dataset_id=old.dataset_id,
        test_dataset_id=old.test_dataset_id,
        source_url=old.source_url,
        base_model_id=old.base_model_id,
        promote="never",
        created_by=created_by,
        idempotency_key=idempotency_key,
        reproduction_of=old.id,
    )
    return submit(session, again, quota=quota)


def _require_data(session: Session, old: Job) -> None:
    """Lock the datasets against deletion until the transaction ends."""
    try:
        if old.test_dataset_id is not None:
            catalog.ready(session, old.tenant_id, old.test_dataset_id)
        if old.source_url is not None:
            return
        if old.dataset_id is None:
            raise DatasetGone
        catalog.ready(session, old.tenant_id, old.dataset_id)
    except DatasetNotFound:
        raise DatasetGone from None


def _params_of(session: Session, job_id: uuid.UUID, otherwise: Json) -> Json:
    """The complete parameters of the training, so that defaults that changed since do not matter."""
    model = session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))
    return model.params if model else otherwise


# --- the comparison ---


def save_comparison(session: Session, claim: Claim) -> None:
    """If the claimed training reproduces another, store the comparison on the job and as its event.

    Call it after `promotion.register`, in the transaction that ends the job.
    """
    job = session.get_one(Job, claim.job_id)
    if job.reproduction_of is None:
        return
    original, now = (
        session.scalar(select(ModelVersion).where(ModelVersion.job_id == each))
        for each in (job.reproduction_of, job.id)
    )
    if original is None or now is None:
        return
    job.reproduction = {"of": str(job.reproduction_of), **compare_versions(original, now)}
    session.flush()
    record(session, job.id, job.tenant_id, "reproduced", job.reproduction)


def compare_versions(original: ModelVersion, now: ModelVersion) -> Json:
    """Revision, environment, dataset, and each metric that differs, as [original, now]."""
    environment = differences(original.environment, now.environment)
    # `engines` describes the machine that trained, not the result.
    theirs, ours = (numeric_leaves({**version.metrics, "engines": None}) for version in (original, now))
    metrics = {
        name: pair
        for name, pair in differences(theirs, ours).items()
        if None in pair or abs(pair[0] - pair[1]) > TOLERANCE
    }
    return {
        "revision": {
            "original": original.code_revision,
            "now": now.code_revision,
            "same": _same_code(original.code_revision, now.code_revision),
        },
        "same_environment": not environment,
        "environment_differences": environment,
        "same_dataset": original.dataset_digest == now.dataset_digest,
        "matches": not metrics,
        "tolerance": TOLERANCE,
        "differences": metrics,
    }


def numeric_leaves(metrics: Json) -> dict[str, float]:
    """The numeric leaves by dotted name (`per_class.Tumor.f1`, `confusion_matrix.0.1`), without times."""
    return dict(_leaves(metrics, ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if not str(key).endswith("seconds"):
            yield from _leaves(child, f"{name}.{key}" if name else str(key))


def differences(original: Json, now: Json) -> dict[str, list[Any]]:
    """The entries that differ, by name, as [original, now]; None if one has no such entry."""
    names = [*original, *(name for name in now if name not in original)]
    pairs = {name: [original.get(name), now.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _same_code(original: str | None, now: str | None) -> bool:
    return original is not None and original == now and not original.endswith(DIRTY_SUFFIX)
