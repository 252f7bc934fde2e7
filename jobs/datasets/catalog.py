"""The dataset registry: uploaded zips, each checked by an ingest job before a training may use it."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.db import seconds
from jobs.deletions import receipts
from jobs.deletions.of_jobs import forget_answers, hide
from jobs.errors import DatasetInUse, DatasetNotFound, DatasetNotReady, Invalid, NoDataset
from jobs.paging import Page, page
from jobs.queue.submission import UNLIMITED, NewJob, Quota, submit
from jobs.states import TERMINAL, DatasetState, JobKind, JobState, Lane
from jobs.storage.blobs import Blob
from jobs.tables import Dataset, Deletion, DeletionKind, Job, Json
from ml.spec.pipeline import IMAGE


@dataclass(frozen=True)
class DatasetView:
    """A dataset as clients see it: if its check has failed, it is `invalid` instead of `checking` for ever."""

    dataset: Dataset
    state: str
    problems: Sequence[str]

    @property
    def warnings(self) -> Sequence[str]:
        """Findings that allow training but make its scores doubtful."""
        return (self.dataset.report or {}).get("warnings", [])


def create(
    session: Session,
    tenant_id: str,
    name: str,
    blob: Blob,
    created_by: uuid.UUID | None = None,
    idempotency_key: str | None = None,
    quota: Quota = UNLIMITED,
    pipeline: str = IMAGE,
) -> tuple[DatasetView, Job]:
    """Register a stored zip and submit the job that checks it."""
    dataset = Dataset(
        tenant_id=tenant_id, pipeline=pipeline, name=name, archive_sha256=blob.sha256, archive_bytes=blob.size
    )
    session.add(dataset)
    session.flush()
    new = NewJob(
        tenant_id,
        JobKind.INGEST,
        Lane.BATCH,
        pipeline,
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


def list_datasets(session: Session, tenant_id: str, limit: int, after: uuid.UUID | None) -> Page[DatasetView]:
    """The tenant's datasets, newest first."""
    query = _datasets(tenant_id).order_by(Dataset.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Dataset.id < after)
    rows = session.execute(query).all()
    return page([_view(dataset, state) for dataset, state in rows], limit, lambda view: view.dataset.id)


def ready(session: Session, tenant_id: str, dataset_id: uuid.UUID, pipeline: str | None = None) -> Dataset:
    """A dataset that may be trained on, locked against deletion until the transaction ends.

    Raises:
        DatasetNotFound, DatasetNotReady
        Invalid: it is of another pipeline.
    """
    query = _datasets(tenant_id).where(Dataset.id == dataset_id).with_for_update(of=Dataset, read=True, key_share=True)
    view = _found(session.execute(query).first())
    if view.state != DatasetState.READY:
        raise DatasetNotReady(state=view.state)
    if pipeline not in (None, theirs := view.dataset.pipeline):
        raise Invalid(
            f"This dataset is of the pipeline {theirs}: set pipeline: {theirs}, or name another one.", "/pipeline"
        )
    return view.dataset


def newest_ready(session: Session, tenant_id: str, pipeline: str = IMAGE) -> Dataset:
    """The newest dataset that may be trained on.

    Raises:
        NoDataset
    """
    ready = select(Dataset).where(
        Dataset.tenant_id == tenant_id, Dataset.pipeline == pipeline, Dataset.state == DatasetState.READY
    )
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
    """Record the result of the ingest job: ready with a digest and without problems, otherwise invalid.

    Idempotent: only a dataset in the state `checking` is updated. `report`: {"inspection": {…}, "warnings": […]}.
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


def delete(session: Session, tenant_id: str, dataset_id: uuid.UUID, by_key: uuid.UUID | None = None) -> Deletion:
    """Delete a dataset, and the jobs that checked it. Idempotent. Its zip is deleted by retention, unless another row
    refers to the same bytes.

    Raises:
        DatasetNotFound
        DatasetInUse: a job that has not ended needs it.
    """
    checks = Job.dataset_id == dataset_id, Job.kind == JobKind.INGEST
    job_ids = session.scalars(select(Job.id).where(*checks)).all()
    idempotency.forget(session, tenant_id, [dataset_id])
    forget_answers(session, tenant_id, job_ids)
    # The lock blocks new trainings with it: their foreign key waits for it.
    mine = select(Dataset).where(Dataset.id == dataset_id, Dataset.tenant_id == tenant_id).with_for_update()
    dataset = session.scalar(mine)
    if dataset is None:
        return receipts.repeated(session, tenant_id, DeletionKind.DATASET, dataset_id, DatasetNotFound)
    needs = or_(Job.dataset_id == dataset_id, Job.test_dataset_id == dataset_id)
    job_id = session.scalar(select(Job.id).where(needs, Job.state.not_in(TERMINAL)).limit(1))
    if job_id is not None:
        raise DatasetInUse(job_id=job_id)
    deletion = receipts.begin(session, tenant_id, DeletionKind.DATASET, dataset_id, by_key)
    checked = select(Job.id).where(*checks).order_by(Job.id).with_for_update(of=Job)
    hide(session, deletion, session.scalars(checked).all())
    receipts.add_counts(deletion, {"datasets": 1})
    session.delete(dataset)
    session.flush()
    return deletion


def delete_old(session: Session, days: float) -> bool:
    """Delete the oldest dataset that was uploaded, and last used by a job, more than `days` ago. True: there may be
    more."""
    before = func.now() - seconds(days * 24 * 3600)
    uses = or_(Job.dataset_id == Dataset.id, Job.test_dataset_id == Dataset.id)
    used = exists().where(uses, or_(Job.finished_at.is_(None), Job.finished_at >= before))
    old = select(Dataset.tenant_id, Dataset.id).where(Dataset.created_at < before, ~used).order_by(Dataset.created_at)
    found = session.execute(old.limit(1)).first()
    if found is None:
        return False
    delete(session, *found)
    return True


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
