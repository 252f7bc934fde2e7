"""From a checked request to a training job."""

import uuid
from typing import Any

from api.http.context import principal, quota, tenant, transaction
from api.http.idempotency import key
from jobs.datasets import catalog
from jobs.models import registry
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane
from jobs.tables import ModelVersion

Body = dict[str, Any]


def train_one(body: Body) -> uuid.UUID:
    """Submit a training on the body's dataset or address. Returns the job's id.

    Raises:
        DatasetNotFound, DatasetNotReady, Invalid, QueueFull
    """
    with transaction() as session:
        if "dataset_id" in body:
            catalog.ready(session, tenant(), body["dataset_id"])
        base = registry.base_of(session, tenant(), body.get("params", {}))
        return submit(session, _training(body, base), quota=quota()).id


def train_on_newest(body: Body) -> uuid.UUID:
    """Submit a training; on the newest dataset that is ready where the body names none. Returns the job's id.

    Raises:
        NoDataset, and what `train_one` raises
    """
    if "source_url" not in body and "dataset_id" not in body:
        with transaction() as session:
            body = {**body, "dataset_id": catalog.newest_ready(session, tenant()).id}
    return train_one(body)


def _training(body: Body, base: ModelVersion | None) -> NewJob:
    return NewJob(
        tenant_id=tenant(),
        kind=JobKind.TRAIN,
        lane=Lane(body["lane"]),
        name=body.get("name"),
        params=body.get("params", {}),
        metadata=body["metadata"],
        dataset_id=body.get("dataset_id"),
        source_url=body.get("source_url"),
        base_model_id=base.id if base else None,
        promote=body["promote"],
        created_by=principal().key_id,
        idempotency_key=key(),
    )
