"""A training job's request, read from its rows, and the command line of the child process that runs it."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from sqlalchemy.orm import Session

from jobs.errors import Invalid, ModelNotFound
from jobs.models import registry
from jobs.queue import checkpoints
from jobs.tables import Checkpoint, Dataset, Job, Json
from ml.runtime.config import PipelineConfig, parse_params
from ml.runtime.errors import BadParams, WeightsMissing
from ml.spec import image_compat
from worker.execution.unit import UnitLease, WorkFailed
from worker.tracking.provenance import code_revision


@dataclass(frozen=True)
class Champion:
    """The tenant's champion when the training began: the new network is compared with it."""

    id: uuid.UUID
    weights_sha256: str


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, read once from the rows, and how far earlier attempts got."""

    params: Json
    archive_sha256: str | None
    dataset_digest: str | None
    source_url: str | None
    base_sha256: str | None  # weights of the version to start from
    champion: Champion | None
    mlflow_run_id: str | None
    checkpoints: Sequence[Checkpoint]


def read(session: Session, unit: UnitLease) -> TrainingRequest:
    """The request of the unit's job.

    Raises:
        WorkFailed: its dataset or base version is gone, or this code does not accept its parameters.
    """
    job = session.get_one(Job, unit.claim.job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None and job.source_url is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before the training began. Upload it again.")
    return TrainingRequest(
        params=_with_defaults(job.params),
        archive_sha256=dataset.archive_sha256 if dataset else None,
        dataset_digest=dataset.digest if dataset else None,
        source_url=job.source_url,
        base_sha256=_base(session, job),
        champion=_champion(session, job.tenant_id),
        mlflow_run_id=job.mlflow_run_id,
        checkpoints=checkpoints.latest(session, job.id, job.retry_of),
    )


def _with_defaults(params: Json) -> Json:
    """The job's parameters completed with the defaults of `ml/spec/image.py`: what is recorded is what was used."""
    try:
        return parse_params(image_compat.current(params)).model_dump(mode="json")
    except BadParams as error:
        raise WorkFailed("BAD_PARAMS", str(error)) from error


def _base(session: Session, job: Job) -> str | None:
    """The weights of the version that the job was pinned to when it was submitted."""
    try:
        if job.base_model_id is not None:
            return registry.by_id(session, job.base_model_id).weights_sha256
        base = registry.base_model(session, job.tenant_id, job.params)
    except (ModelNotFound, Invalid) as error:
        raise WorkFailed("WEIGHTS_MISSING", "The version that the training was to begin from is gone.") from error
    return base.weights_sha256 if base else None


def _champion(session: Session, tenant_id: str) -> Champion | None:
    found = registry.find_champion(session, tenant_id)
    return Champion(found.id, found.weights_sha256) if found else None


# --- the child's command line ---


def arguments(unit: UnitLease, request: TrainingRequest, folder: Path) -> list[str]:
    """The child's command line; the files that it names are written into the attempt's folder.

    Raises:
        WorkFailed: the weights to start from are missing.
    """
    settings = unit.resources.settings
    config, params = _write_config(unit, request, folder)
    command = ["train", "--config", str(config), "--params", str(params), "--events"]
    command += ["--checkpoints", str(folder / "checkpoints"), "--checkpoint-seconds", str(settings.checkpoint_seconds)]
    if settings.feature_cache_bytes:
        command += ["--cache", str(settings.feature_cache), "--cache-bytes", str(settings.feature_cache_bytes)]
    if (base := _base_weights(unit, request, folder)) is not None:
        command += ["--base-weights", str(base)]
    if request.champion and (weights := _fetch_weights(unit, request.champion.weights_sha256, folder)) is not None:
        command += ["--champion", str(weights)]
    if (revision := code_revision()) is not None:
        command += ["--revision", revision]
    return command


def _base_weights(unit: UnitLease, request: TrainingRequest, folder: Path) -> Path | None:
    """The file that `weights: file:NAME` or `version:N` stands for; None for other weights."""
    if request.base_sha256 is not None:
        if (weights := _fetch_weights(unit, request.base_sha256, folder)) is not None:
            return weights
        raise WorkFailed("MODEL_MISSING", "The weights of the version to begin from cannot be read. Train it again.")
    name = image_compat.base_file(request.params)
    return None if name is None else _weights_file(name, unit.resources.settings.weights_dir)


def _fetch_weights(unit: UnitLease, sha256: str, folder: Path) -> Path | None:
    """A version's weights; None where they are not stored."""
    try:
        path = unit.resources.artifacts.fetch(sha256, folder)
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


def _weights_file(name: str, folder: Path | None) -> Path:
    # A name with a path in it would let a client read other files. The API refuses it as well.
    plain = Path(name).name == name
    if plain and folder is not None and (folder / name).is_file():
        return folder.absolute() / name
    where = "the folder that RENALQ_WEIGHTS_DIR names" if folder else "a folder, and its path into RENALQ_WEIGHTS_DIR"
    detail = (
        f"weights: the workers have no file {Path(name).name}. Put it into {where}, or set weights: imagenet or none."
    )
    raise WorkFailed(WeightsMissing.code, detail)


def _write_config(unit: UnitLease, request: TrainingRequest, folder: Path) -> tuple[Path, Path]:
    """The child's config and params files: as `config/config.yaml`, with this attempt's own paths."""
    root = folder / "artifacts"
    archive = folder / "data.zip"
    if request.archive_sha256 is not None:
        archive.symlink_to(unit.resources.artifacts.fetch(request.archive_sha256, folder))
    config = PipelineConfig.below(root)
    scans = {"source_url": request.source_url, "local_data_file": archive}
    config = config.model_copy(update={"data_ingestion": config.data_ingestion.model_copy(update=scans)})
    files = folder / "config.yaml", folder / "params.yaml"
    for path, content in zip(files, (config.model_dump(mode="json", by_alias=True), request.params), strict=True):
        path.write_text(yaml.safe_dump(content))
    return files
