"""A training job's request, read from its rows, and the file that hands it to the child process that runs it."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.orm import Session

from jobs.errors import Invalid, ModelNotFound
from jobs.models import registry
from jobs.queue import checkpoints
from jobs.tables import Checkpoint, Dataset, Job, Json
from ml.pipelines import TrainingJob
from ml.runtime.config import parse
from ml.runtime.errors import BadParams, DownloadFailed, WeightsMissing
from ml.spec.pipeline import PipelineSpec
from ml.spec.registry import UnknownPipeline, spec_of
from worker.execution.unit import UnitLease, WorkFailed
from worker.handlers.remote_fetch import FetchFailed, OnBlock, fetch_dataset
from worker.tracking.provenance import code_revision

DOWNLOAD_SHARE = 0.4
"""Of the first stage's progress, if the dataset is fetched."""
REPORT_SECONDS, REPORT_BYTES = 0.5, 256 * 1024
"""Between two reports of a download's progress."""


@dataclass(frozen=True)
class Champion:
    """The tenant's champion when the training began: the new network is compared with it, as it predicts then."""

    id: uuid.UUID
    weights_sha256: str
    threshold: float | None = None
    pooling: Json | None = None


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, read once from the rows, and how far earlier attempts got."""

    spec: PipelineSpec
    name: str | None  # the job's
    params: Json
    archive_sha256: str | None
    dataset_digest: str | None
    source_url: str | None
    source: Path | None  # what was fetched from it
    base_sha256: str | None  # weights of the version to start from
    champion: Champion | None
    test_sha256: str | None  # of the locked test set
    mlflow_run_id: str | None
    checkpoints: Sequence[Checkpoint]
    titles: dict[str, str]
    cache_owners: tuple[str, ...] = ()
    progress: float = 0.0

    @property
    def downloaded(self) -> float:
        """The share of the first stage that is done before the child begins."""
        return DOWNLOAD_SHARE if self.source else 0.0


def read(session: Session, unit: UnitLease) -> TrainingRequest:
    """The request of the unit's job.

    Raises:
        WorkFailed: its dataset or base version is gone, or this code does not accept its parameters.
    """
    job = session.get_one(Job, unit.claim.job_id)
    spec = installed_spec(job.pipeline)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None and job.source_url is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before the training began. Upload it again.")
    return TrainingRequest(
        spec=spec,
        name=job.name,
        params=_with_defaults(spec, job.params),
        archive_sha256=dataset.archive_sha256 if dataset else None,
        dataset_digest=dataset.digest if dataset else None,
        source_url=job.source_url,
        source=None,
        base_sha256=_base(session, job),
        champion=_champion(session, job),
        test_sha256=_locked_test(session, job),
        mlflow_run_id=job.mlflow_run_id,
        checkpoints=checkpoints.latest(session, job.id, job.retry_of),
        titles=_titles(job, dataset),
        cache_owners=_cache_owners(job),
        progress=job.progress,
    )


def _cache_owners(job: Job) -> tuple[str, ...]:
    """Whose pixels and features the training caches: its datasets', or what it fetches itself."""
    return tuple(str(owner) for owner in (job.dataset_id or job.id, job.test_dataset_id) if owner)


def _titles(job: Job, dataset: Dataset | None) -> dict[str, str]:
    """What the report names at its head. The version gets its number when the training has ended."""
    return {
        "Job": f"{job.id}, task {job.task}",
        "Model version": f"model_version of this job, GET /jobs/{job.id}",
        "Dataset": f"{dataset.name} ({dataset.id})" if dataset else "fetched from an address",
    }


def installed_spec(pipeline: str) -> PipelineSpec:
    """The spec of a job's pipeline.

    Raises:
        WorkFailed: this worker does not have it.
    """
    try:
        return spec_of(pipeline)
    except UnknownPipeline as error:
        raise WorkFailed("PIPELINE_MISSING", f"{error} Install it with the workers as well.") from error


def _with_defaults(spec: PipelineSpec, params: Json) -> Json:
    """The job's parameters completed with the pipeline's defaults: what is recorded is what was used."""
    try:
        return parse(spec.params, spec.stored.current(params)).model_dump(mode="json")
    except BadParams as error:
        raise WorkFailed("BAD_PARAMS", str(error)) from error


def _base(session: Session, job: Job) -> str | None:
    """The weights of the version that the job was pinned to when it was submitted."""
    try:
        if job.base_model_id is not None:
            return registry.by_id(session, job.base_model_id).weights_sha256
        base = registry.base_model(session, job.tenant_id, job.params, job.pipeline)
    except (ModelNotFound, Invalid) as error:
        raise WorkFailed("WEIGHTS_MISSING", "The version that the training was to begin from is gone.") from error
    return base.weights_sha256 if base else None


def _locked_test(session: Session, job: Job) -> str | None:
    if job.test_dataset_id is None:
        return None
    dataset = session.get(Dataset, job.test_dataset_id)
    if dataset is None:
        raise WorkFailed("BAD_DATASET", "The dataset to test on was deleted before the training began.")
    return dataset.archive_sha256


def _champion(session: Session, job: Job) -> Champion | None:
    found = registry.find_champion(session, job.tenant_id, job.pipeline, job.task)
    if found is None:
        return None
    return Champion(found.id, found.weights_sha256, found.metrics.get("threshold"), found.metrics.get("pooling"))


# --- a dataset that is fetched ---


def with_source(unit: UnitLease, request: TrainingRequest, folder: Path) -> TrainingRequest:
    """The request with its dataset in the unit's folder, if it is to be fetched.

    Raises:
        WorkFailed
    """
    if request.source_url is None:
        return request
    try:
        source = fetch_dataset(request.source_url, folder, unit.resources.settings, _reporter(unit, request.spec))
    except FetchFailed as error:
        raise WorkFailed(DownloadFailed.code, f"source_url: {error}", error.retryable) from None
    return replace(request, source=source)


def _reporter(unit: UnitLease, spec: PipelineSpec) -> OnBlock:
    """Report the download as progress of the first stage, and stop it when the unit is interrupted."""
    stage, reported_at, reported_bytes = spec.stages[0].name, time.monotonic(), 0

    def report(came: int, announced: int) -> None:
        nonlocal reported_at, reported_bytes
        unit.check()
        # Slower than this is no progress: the unit is taken back after `stall_seconds`.
        if time.monotonic() - reported_at < REPORT_SECONDS or came - reported_bytes < REPORT_BYTES:
            return
        reported_at, reported_bytes = time.monotonic(), came
        fraction = DOWNLOAD_SHARE * min(came / announced, 1.0) if announced else 0.0
        unit.report(stage=stage, progress=spec.progress(stage, fraction))

    return report


# --- for the child ---


def write(unit: UnitLease, request: TrainingRequest, folder: Path, resume: Path | None) -> Path:
    """The child's `TrainingJob` as a JSON file in the attempt's folder.

    Raises:
        WorkFailed: the weights to start from are missing.
    """
    settings, store = unit.resources.settings, unit.resources.artifacts
    archive, champion = folder / "data.zip", request.champion
    checkpoints_folder = folder / "checkpoints"
    checkpoints_folder.mkdir()
    source = request.source or store.fetch(str(request.archive_sha256), folder)
    archive.symlink_to(source)
    test = store.fetch(request.test_sha256, folder) if request.test_sha256 is not None else None
    job = TrainingJob(
        pipeline=request.spec.name,
        params=request.params,
        folder=folder,
        archive=archive,
        checkpoints=checkpoints_folder,
        checkpoint_seconds=settings.checkpoint_seconds,
        resume=resume,
        base_model=_base_weights(unit, request, folder),
        champion=_fetch_weights(unit, champion.weights_sha256, folder) if champion else None,
        champion_threshold=champion.threshold if champion else None,
        champion_pooling=champion.pooling if champion else None,
        test_archive=test,
        cache=settings.feature_cache if settings.feature_cache_bytes else None,
        cache_bytes=settings.feature_cache_bytes,
        cache_owners=request.cache_owners,
        weights_dir=settings.weights,
        revision=code_revision(),
        titles=request.titles,
    )
    file = folder / "job.json"
    file.write_text(json.dumps(job.as_json()))
    return file


def _base_weights(unit: UnitLease, request: TrainingRequest, folder: Path) -> Path | None:
    """The file that `weights: file:NAME` or `version:N` stands for; None for other weights."""
    if request.base_sha256 is not None:
        if (weights := _fetch_weights(unit, request.base_sha256, folder)) is not None:
            return weights
        raise WorkFailed("MODEL_MISSING", "The weights of the version to begin from cannot be read. Train it again.")
    name = request.spec.stored.base_file(request.params)
    return None if name is None else _weights_file(name, unit.resources.settings.weights)


def _fetch_weights(unit: UnitLease, sha256: str, folder: Path) -> Path | None:
    """A version's weights; None where they are not stored."""
    try:
        path = unit.resources.artifacts.fetch(sha256, folder)
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


def _weights_file(name: str, folder: Path) -> Path:
    # A name with a path in it would let a client read other files. The API refuses it as well.
    if Path(name).name == name and (folder / name).is_file():
        return folder / name
    detail = (
        f"weights: the workers have no file {Path(name).name}. Put it into the folder that RENALQ_WEIGHTS_DIR names "
        "(by default RENALQ_HOME/weights), or set weights: imagenet or none."
    )
    raise WorkFailed(WeightsMissing.code, detail)
