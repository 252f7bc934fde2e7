"""The dataset registry: a zip with one folder a class, checked by an ingest job before any training may use it."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.errors import DatasetInUse, DatasetNotFound, DatasetNotReady, NoDataset
from jobs.paging import Page, page
from jobs.queue.submission import UNLIMITED, NewJob, Quota, submit
from jobs.states import TERMINAL, DatasetState, JobKind, JobState, Lane
from jobs.storage.blobs import Artifacts, Blob
from jobs.tables import Artifact, Dataset, Job, Json, ModelVersion, Scan


@dataclass(frozen=True)
class DatasetView:
    """A dataset as a client sees it: one whose check has died is invalid, not checked for ever."""

    dataset: Dataset
    state: str
    problems: Sequence[str]

    @property
    def warnings(self) -> Sequence[str]:
        """What does not keep the dataset from being trained on, but makes its scores doubtful."""
        return (self.dataset.report or {}).get("warnings", [])


def create(
    session: Session,
    tenant_id: str,
    name: str,
    blob: Blob,
    created_by: uuid.UUID | None = None,
    idempotency_key: str | None = None,
    quota: Quota = UNLIMITED,
) -> tuple[DatasetView, Job]:
    """Register a stored zip, and submit the job that checks it. Call `keep_blob` in the same transaction."""
    dataset = Dataset(tenant_id=tenant_id, name=name, archive_sha256=blob.sha256, archive_bytes=blob.size)
    session.add(dataset)
    session.flush()
    new = NewJob(
        tenant_id,
        JobKind.INGEST,
        Lane.BATCH,
        dataset_id=dataset.id,
        created_by=created_by,
        idempotency_key=idempotency_key,
    )
    job = submit(session, new, quota=quota)
    dataset.job_id = job.id
    session.flush()
    session.refresh(dataset)
    return _view(dataset, job.state), job


def get(session: Session, tenant_id: str, dataset_id: uuid.UUID) -> DatasetView:
    """One dataset.

    Raises:
        DatasetNotFound
    """
    return _found(session.execute(_datasets(tenant_id).where(Dataset.id == dataset_id)).first())


def listed(session: Session, tenant_id: str, limit: int, after: uuid.UUID | None) -> Page[DatasetView]:
    """The tenant's datasets, newest first."""
    query = _datasets(tenant_id).order_by(Dataset.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Dataset.id < after)
    rows = session.execute(query).all()
    return page([_view(dataset, state) for dataset, state in rows], limit, lambda view: view.dataset.id)


def ready(session: Session, tenant_id: str, dataset_id: uuid.UUID) -> Dataset:
    """A dataset that may be trained on; it cannot be deleted before the transaction's end.

    Raises:
        DatasetNotFound, DatasetNotReady
    """
    query = _datasets(tenant_id).where(Dataset.id == dataset_id).with_for_update(of=Dataset, read=True, key_share=True)
    view = _found(session.execute(query).first())
    if view.state != DatasetState.READY:
        raise DatasetNotReady(state=view.state)
    return view.dataset


def newest_ready(session: Session, tenant_id: str) -> Dataset:
    """The newest dataset that may be trained on.

    Raises:
        NoDataset
    """
    ready = select(Dataset).where(Dataset.tenant_id == tenant_id, Dataset.state == DatasetState.READY)
    found = session.scalar(ready.order_by(Dataset.id.desc()).limit(1))
    if found is None:
        raise NoDataset
    return found


def finish_check(
    session: Session,
    job_id: uuid.UUID,
    classes: Mapping[str, int],
    digest: str | None,
    problems: Sequence[str],
    report: Json | None = None,
) -> None:
    """Write down what the ingest job found: ready with a digest and no problem, else invalid.

    `report`: {"inspection": {…}, "warnings": […]}, as the check left it.

    Said twice, it changes nothing: only a dataset that is still being checked is written.
    """
    good = digest is not None and not problems
    session.execute(
        update(Dataset)
        .where(Dataset.job_id == job_id, Dataset.state == DatasetState.CHECKING)
        .values(
            state=DatasetState.READY if good else DatasetState.INVALID,
            classes=dict(classes),
            digest=digest,
            report=report,
            problems=list(problems) if good or problems else ["The check found nothing that could be trained on."],
        )
    )


def delete(session: Session, tenant_id: str, dataset_id: uuid.UUID) -> str:
    """Remove a dataset and return its zip's hash: give it to `free_blob` in a later transaction.

    Raises:
        DatasetNotFound
        DatasetInUse: a job that has not ended needs it.
    """
    # The lock keeps trainings from beginning with it meanwhile: their foreign key waits for it.
    mine = select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant_id == tenant_id).with_for_update()
    dataset = session.scalar(mine)
    if dataset is None:
        raise DatasetNotFound
    if session.scalar(select(exists().where(Job.dataset_id == dataset_id, Job.state.not_in(TERMINAL)))):
        raise DatasetInUse
    session.delete(dataset)
    session.flush()
    return dataset.archive_sha256


def keep_blob(session: Session, artifacts: Artifacts, blob: Blob, stream: IO[bytes]) -> None:
    """Make sure that a blob is still there until the transaction's end: `free_blob` of its twin may have taken it."""
    _lock_blob(session, blob.sha256)
    if not artifacts.exists(blob.sha256):
        stream.seek(0)
        artifacts.put(stream)


def free_blob(session: Session, artifacts: Artifacts, sha256: str) -> bool:
    """Remove a blob that nothing refers to. Returns whether it was removed."""
    _lock_blob(session, sha256)
    if session.scalar(select(or_(*_references(sha256)))):
        return False
    artifacts.delete(sha256)
    return True


def _lock_blob(session: Session, sha256: str) -> None:
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("blob:" + sha256))))


def _references(sha256: str) -> list[ColumnElement[bool]]:
    columns = (Dataset.archive_sha256, Scan.sha256, Artifact.sha256, ModelVersion.weights_sha256)
    return [exists().where(column == sha256) for column in columns]


def _datasets(tenant_id: str):  # type: ignore[no-untyped-def]
    check = select(Job.state).where(Job.id == Dataset.job_id).scalar_subquery()
    return select(Dataset, check.label("check")).where(Dataset.tenant_id == tenant_id)


def _found(row) -> DatasetView:  # type: ignore[no-untyped-def]
    if row is None:
        raise DatasetNotFound
    return _view(*row)


def _view(dataset: Dataset, check: str | None) -> DatasetView:
    died = dataset.state == DatasetState.CHECKING and check in TERMINAL and check != JobState.SUCCEEDED
    if not died:
        return DatasetView(dataset, dataset.state, dataset.problems)
    why = f"Its check has {check}: see GET /jobs/{dataset.job_id}, then delete the dataset and upload it again."
    return DatasetView(dataset, DatasetState.INVALID, [why])
