"""Training requests, and the jobs made of them."""

import uuid
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate
from sqlalchemy.orm import Session

from api.http.context import principal, quota, services, tenant, transaction
from api.http.fields import HttpUrl, Metadata, exactly_one
from api.http.idempotency import key
from api.http.pipelines.fields import PipelineName, PipelineParams, TaskName, spec_of
from api.resources.jobs.receivers import NamesReceiver, receiver_of
from jobs.addresses import fetch_url_error
from jobs.datasets import catalog
from jobs.errors import Invalid
from jobs.models import registry
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane
from jobs.tables import Dataset, ModelVersion
from ml.spec.params import misfits
from ml.spec.pipeline import DEFAULT_TASK, IMAGE, DatasetFacts, PipelineSpec

Body = dict[str, Any]


class TrainRequest(NamesReceiver):
    """A training on a stored dataset, or on one to fetch."""

    dataset_id = fields.UUID()
    source_url = HttpUrl()
    test_dataset_id = fields.UUID(
        metadata={"description": "A dataset that is tested on and decides nothing else; then dataset_id only trains."}
    )
    pipeline = PipelineName(load_default=IMAGE)
    task = TaskName(load_default=DEFAULT_TASK)
    params = PipelineParams()
    name = fields.String(validate=validate.Length(1, 200))
    promote = fields.String(validate=validate.OneOf(["auto", "never"]), load_default="auto")
    lane = fields.String(validate=validate.OneOf([str(Lane.TRAIN)]), load_default=str(Lane.TRAIN))
    metadata = Metadata(load_default=dict)

    @ma.validates_schema
    def _one_source(self, data: dict[str, Any], **kwargs: Any) -> None:
        exactly_one(data, "dataset_id", "source_url")


def train_one(body: Body) -> uuid.UUID:
    """Submit a training on the body's dataset or source URL. Returns the job's id.

    Raises:
        DatasetNotFound, DatasetNotReady, Invalid, WeightsMissing, ModelFileGone, QueueFull
    """
    if "source_url" in body and (why := fetch_url_error(body["source_url"], services().settings.allowed_hosts)):
        raise Invalid(why, "/source_url")
    with transaction() as session:
        tested = _locked_test(session, body)
        if "dataset_id" in body:
            dataset = catalog.ready(session, tenant(), body["dataset_id"], spec_of(body).name)
            refuse_misfits(spec_of(body), body.get("params", {}), dataset, tested)
        base = registry.base_model(session, tenant(), body.get("params", {}), spec_of(body).name)
        if base is not None:
            registry.require_file(base, services().blobs)
        return submit(session, _training(body, base), quota=quota()).id


def _locked_test(session: Session, body: Body) -> Dataset | None:
    """The dataset to test on, if the body names one."""
    if "test_dataset_id" not in body:
        return None
    if body["test_dataset_id"] == body.get("dataset_id"):
        raise Invalid("Name another dataset than the one to learn from.", "/test_dataset_id")
    return catalog.ready(session, tenant(), body["test_dataset_id"], spec_of(body).name)


def refuse_misfits(spec: PipelineSpec, params: Body, dataset: Dataset, tested: Dataset | None = None) -> None:
    """Refuse parameters that do not fit the dataset's classes, or that it is too thin for.

    Raises:
        Invalid: points at the first of them.
    """
    given, counted = spec.params.model_validate(params), (dataset.report or {}).get("inspection") or {}
    facts = DatasetFacts(dataset.classes or {}, counted, (tested.classes or {}) if tested else None)
    for field, message in (*misfits(given, sorted(facts.classes)), *spec.shortages(given, facts)):
        raise Invalid(message, f"/params/{field}" if field in spec.params.model_fields else f"/{field}")


def train_on_newest(body: Body) -> uuid.UUID:
    """Submit a training, by default on the newest ready dataset. Returns the job's id.

    Raises:
        NoDataset, and what `train_one` raises
    """
    if "source_url" not in body and "dataset_id" not in body:
        with transaction() as session:
            body = {**body, "dataset_id": catalog.newest_ready(session, tenant(), spec_of(body).name).id}
    return train_one(body)


def _training(body: Body, base: ModelVersion | None) -> NewJob:
    return NewJob(
        tenant_id=tenant(),
        kind=JobKind.TRAIN,
        pipeline=spec_of(body).name,
        task=body.get("task", DEFAULT_TASK),
        lane=Lane(body["lane"]),
        name=body.get("name"),
        params=body.get("params", {}),
        metadata=body["metadata"],
        dataset_id=body.get("dataset_id"),
        test_dataset_id=body.get("test_dataset_id"),
        source_url=body.get("source_url"),
        base_model_id=base.id if base else None,
        promote=body["promote"],
        created_by=principal().key_id,
        idempotency_key=key(),
        receiver=receiver_of(body),
    )
