"""Model versions: insert what a training made, find the champion, and resolve the version that a job is pinned to."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Integer, cast, func, select
from sqlalchemy.orm import Session

from jobs.errors import Invalid, ModelFileGone, ModelNotFound, NoChampion
from jobs.storage.blobs import BlobStore
from jobs.tables import Deletion, DeletionKind, Job, Json, ModelVersion
from ml.spec.pipeline import DEFAULT_TASK, IMAGE
from ml.spec.registry import spec_of

CHAMPION = "champion"


@dataclass(frozen=True)
class NewModel:
    """What a training made. `promotion.register` turns it into a version."""

    weights_sha256: str
    classes: list[str]
    params: Json
    metrics: Json
    dataset_digest: str | None
    code_revision: str | None
    environment: Json = field(default_factory=dict)
    mlflow_run_id: str | None = None
    reference: Json | None = None
    scan_scores: Json | None = None


def lock(session: Session, tenant_id: str) -> None:
    """Serialize changes of the tenant's registry until the transaction ends: version numbers have no gaps, and the
    champion that was read is still the champion when it is replaced."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("model_versions:" + tenant_id))))


def insert(session: Session, job: Job, new: NewModel) -> ModelVersion:
    """Insert the next version, not promoted and with no gate verdict yet. `lock` must be held."""
    version = ModelVersion(
        tenant_id=job.tenant_id,
        version=_next_version(session, job.tenant_id),
        pipeline=job.pipeline,
        task=job.task,
        job_id=job.id,
        dataset_id=job.dataset_id,
        gate={},
        **vars(new),
    )
    session.add(version)
    session.flush()
    return version


def find_champion(
    session: Session, tenant_id: str, pipeline: str = IMAGE, task: str = DEFAULT_TASK
) -> ModelVersion | None:
    """The tenant's champion of the pipeline and task, as it is now."""
    of_task = ModelVersion.tenant_id == tenant_id, ModelVersion.pipeline == pipeline, ModelVersion.task == task
    champion = select(ModelVersion).where(*of_task, ModelVersion.champion)
    # The session may have read an older state of the row before it took the lock.
    return session.scalar(champion.execution_options(populate_existing=True))


def resolve(
    session: Session, tenant_id: str, wanted: str | None, pipeline: str | None = None, task: str | None = None
) -> ModelVersion:
    """The version that a prediction is pinned to: `champion` (the default) of the pipeline and task, or a version's
    number.

    Raises:
        NoChampion, ModelNotFound
        Invalid: the version is of another pipeline, or of another task.
    """
    if wanted in (None, "", CHAMPION):
        return _champion(session, tenant_id, pipeline or IMAGE, task or DEFAULT_TASK)
    found = session.scalar(
        select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.version == _number(wanted))
    )
    if found is None:
        raise ModelNotFound
    for name, asked in (("pipeline", pipeline), ("task", task)):
        if asked not in (None, theirs := getattr(found, name)):
            raise Invalid(f"Version {found.version} is of the {name} {theirs}, not {asked}.", f"/{name}")
    return found


def _champion(session: Session, tenant_id: str, pipeline: str, task: str) -> ModelVersion:
    champion = find_champion(session, tenant_id, pipeline, task)
    if champion is None and (pipeline, task) == (IMAGE, DEFAULT_TASK):
        raise NoChampion
    if champion is None:
        raise NoChampion(
            f"No model is champion of the pipeline {pipeline} and the task {task} yet. "
            "Train one with POST /jobs/train, or name a version in `model`."
        )
    return champion


def refuse_unadmitted(version: ModelVersion, precision: str) -> None:
    """Refuse a precision for which no engine passed the admission trial of this version (see
    ml.image.engines.admission).

    Versions of older releases have no trials; for those the worker decides.

    Raises:
        Invalid: points at the field, with the result of the trial.
    """
    trials: Json = version.metrics.get("engines") or {}
    mine = [trial for name, trial in trials.items() if name.endswith(f"-{precision}")]
    if precision in ("auto", "fp32") or not trials or any(trial["admitted"] for trial in mine):
        return
    why = mine[0]["reason"] if mine else "it was trained on a machine without it"
    raise Invalid(f"Version {version.version} is not admitted for {precision}: {why}. Use auto.", "/precision")


def base_model(session: Session, tenant_id: str, params: Json, pipeline: str = IMAGE) -> ModelVersion | None:
    """The version that a training with `weights: version:N` starts from; None for other weights.

    Raises:
        Invalid: there is no such version, or it has another network than the parameters; points at the field.
    """
    stored = spec_of(pipeline).stored
    number = stored.base_version(params)
    if number is None:
        return None
    try:
        base = resolve(session, tenant_id, str(number), pipeline)
    except ModelNotFound:
        detail = f"There is no version {number}: GET /models lists yours. Name one of them, or weights: imagenet."
        raise Invalid(detail, "/params/weights") from None
    theirs, ours = stored.architecture(base.params), stored.architecture(params)
    if theirs != ours:
        detail = f"Version {number} is a {theirs}, and network is {ours}: set network: {theirs}, or take other weights."
        raise Invalid(detail, "/params/network")
    return base


def require_file(version: ModelVersion, store: BlobStore) -> None:
    """Refuse a version whose file is not stored any more: its job could only fail.

    Raises:
        ModelFileGone
    """
    if not store.holds(version.weights_sha256):
        raise ModelFileGone(version=version.version)


def require_files_of(session: Session, job: Job, store: BlobStore) -> None:
    """`require_file` for the versions that a job is pinned to: the one that predicts, the one that it trains on from.

    Raises:
        ModelFileGone, ModelNotFound
    """
    for model_id in (job.model_id, job.base_model_id):
        if model_id is not None:
            require_file(by_id(session, model_id), store)


def by_id(session: Session, model_id: uuid.UUID) -> ModelVersion:
    """The version that a job was pinned to.

    Raises:
        ModelNotFound
    """
    found = session.get(ModelVersion, model_id)
    if found is None:
        raise ModelNotFound
    return found


def _number(wanted: Any) -> int:
    try:
        return int(wanted)
    except (TypeError, ValueError):
        raise ModelNotFound from None


def _next_version(session: Session, tenant_id: str) -> int:
    """One more than any so far: the number of a deleted version is not used again."""
    last = select(func.max(ModelVersion.version)).where(ModelVersion.tenant_id == tenant_id)
    deleted = select(func.max(cast(Deletion.target, Integer)))
    deleted = deleted.where(Deletion.tenant_id == tenant_id, Deletion.kind == DeletionKind.MODEL)
    return max(session.scalar(last) or 0, session.scalar(deleted) or 0) + 1
