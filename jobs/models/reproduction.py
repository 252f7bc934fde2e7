"""Doing a training again: the same data, parameters and seed, as a new job; and how its figures compare at its end."""

import uuid
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import training_params
from jobs.datasets import catalog
from jobs.errors import DatasetGone, DatasetNotFound, JobNotFound, WrongState
from jobs.queue.job_events import record
from jobs.queue.leases import Claim
from jobs.queue.submission import UNLIMITED, NewJob, Quota, submit
from jobs.states import JobKind, JobState, Lane
from jobs.tables import Job, Json, ModelVersion

TOLERANCE = 1e-6
"""Two figures match that differ by no more."""
CHANGED = "+changed"
"""How the revision of a checkout with uncommitted changes ends: two of them may hold any code."""


def reproduce(
    session: Session,
    tenant_id: str,
    job_id: uuid.UUID,
    quota: Quota = UNLIMITED,
    created_by: uuid.UUID | None = None,
    idempotency_key: str | None = None,
) -> Job:
    """Submit a succeeded training once more: same dataset, complete parameters, seed; it is never promoted.

    Raises:
        JobNotFound: no such job of this tenant.
        WrongState: it is no training, or has not succeeded.
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
    again = NewJob(
        tenant_id=tenant_id,
        kind=JobKind.TRAIN,
        lane=Lane(old.lane),
        name=old.name,
        params=training_params.current(_made_by(session, old.id, old.params)),
        metadata=old.labels,
        dataset_id=old.dataset_id,
        source_url=old.source_url,
        base_model_id=old.base_model_id,
        promote="never",
        created_by=created_by,
        idempotency_key=idempotency_key,
        reproduction_of=old.id,
    )
    return submit(session, again, quota=quota)


def _require_data(session: Session, old: Job) -> None:
    """The dataset is there, and stays until the transaction's end."""
    if old.source_url is not None:
        return
    try:
        if old.dataset_id is None:
            raise DatasetGone
        catalog.ready(session, old.tenant_id, old.dataset_id)
    except DatasetNotFound:
        raise DatasetGone from None


def _made_by(session: Session, job_id: uuid.UUID, otherwise: Json) -> Json:
    """The parameters with the defaults of their day: a default that has changed since must change nothing."""
    model = session.scalar(select(ModelVersion).where(ModelVersion.job_id == job_id))
    return model.params if model else otherwise


# --- the comparison ---


def write(session: Session, held: Claim) -> None:
    """Where the held training reproduces another, write down how the two compare: on the job, and as its event.

    Call it after `registry.add`, in the transaction that ends the job.
    """
    job = session.get_one(Job, held.job_id)
    if job.reproduction_of is None:
        return
    original, now = (
        session.scalar(select(ModelVersion).where(ModelVersion.job_id == each))
        for each in (job.reproduction_of, job.id)
    )
    if original is None or now is None:
        return
    job.reproduction = {"of": str(job.reproduction_of), **compared(original, now)}
    session.flush()
    record(session, job.id, job.tenant_id, "reproduced", job.reproduction)


def compared(original: ModelVersion, now: ModelVersion) -> Json:
    """How two versions compare: revision, environment, dataset, and each metric that differs, as [original, now]."""
    environment = different(original.environment, now.environment)
    theirs, ours = (numbers({**version.metrics, "engines": None}) for version in (original, now))  # of the machine
    differences = {
        name: pair
        for name, pair in different(theirs, ours).items()
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
        "matches": not differences,
        "tolerance": TOLERANCE,
        "differences": differences,
    }


def numbers(metrics: Json) -> dict[str, float]:
    """The numeric leaves by their dotted names (`per_class.Tumor.f1`, `confusion_matrix.0.1`), but for times."""
    return dict(_leaves(metrics, ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if not str(key).endswith("seconds"):
            yield from _leaves(child, f"{name}.{key}" if name else str(key))


def different(original: Json, now: Json) -> dict[str, list[Any]]:
    """What differs between the two, by name, as [original, now]; None where one has nothing of that name."""
    names = [*original, *(name for name in now if name not in original)]
    pairs = {name: [original.get(name), now.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _same_code(original: str | None, now: str | None) -> bool:
    return original is not None and original == now and not original.endswith(CHANGED)
