"""What a training job asks for, read from its rows; and how its child is told: by flags, two files, and weights."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from sqlalchemy.orm import Session

from jobs import training_params
from jobs.errors import Invalid, ModelNotFound
from jobs.models import registry
from jobs.queue import checkpoints
from jobs.tables import Checkpoint, Dataset, Job, Json
from ml.runtime.config import PipelineConfig
from ml.runtime.errors import BadParams, WeightsMissing
from ml.spec.image import parse_params
from worker.execution.unit import Held, WorkFailed
from worker.tracking.provenance import code_revision


@dataclass(frozen=True)
class Champion:
    """The tenant's champion as the training began: the new network is compared with it."""

    id: uuid.UUID
    weights_sha256: str


@dataclass(frozen=True)
class Order:
    """What is to be trained, read from the rows once; and where an attempt before this one had come to."""

    params: Json
    archive_sha256: str | None
    dataset_digest: str | None
    source_url: str | None
    base_sha256: str | None  # of the version to begin from
    champion: Champion | None
    mlflow_run_id: str | None
    checkpoints: Sequence[Checkpoint]


def read(session: Session, held: Held) -> Order:
    """The held job's order.

    Raises:
        WorkFailed: its dataset or base version is gone, or its parameters are not those of this code.
    """
    job = session.get_one(Job, held.claim.job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None and job.source_url is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before the training began. Upload it again.")
    return Order(
        params=_complete(job.params),
        archive_sha256=dataset.archive_sha256 if dataset else None,
        dataset_digest=dataset.digest if dataset else None,
        source_url=job.source_url,
        base_sha256=_base(session, job),
        champion=_champion(session, job.tenant_id),
        mlflow_run_id=job.mlflow_run_id,
        checkpoints=checkpoints.latest(session, job.id, job.retry_of),
    )


def _complete(params: Json) -> Json:
    """The job's parameters with the defaults of `ml/spec/image.py` beside them: what is recorded is what was used."""
    try:
        return parse_params(training_params.current(params)).model_dump(mode="json")
    except BadParams as error:
        raise WorkFailed("BAD_PARAMS", str(error)) from error


def _base(session: Session, job: Job) -> str | None:
    """The weights of the version that the job was pinned to when it was submitted."""
    try:
        if job.base_model_id is not None:
            return registry.by_id(session, job.base_model_id).weights_sha256
        base = registry.base_of(session, job.tenant_id, job.params)
    except (ModelNotFound, Invalid) as error:
        raise WorkFailed("WEIGHTS_MISSING", "The version that the training was to begin from is gone.") from error
    return base.weights_sha256 if base else None


def _champion(session: Session, tenant_id: str) -> Champion | None:
    found = registry.find_champion(session, tenant_id)
    return Champion(found.id, found.weights_sha256) if found else None


# --- the child's ---


def arguments(held: Held, order: Order, folder: Path) -> list[str]:
    """The child's command line; the files that it names are written into the attempt's folder.

    Raises:
        WorkFailed: the weights to begin from are not there.
    """
    settings = held.resources.settings
    config, params = _write_config(held, order, folder)
    found = ["train", "--config", str(config), "--params", str(params), "--events"]
    found += ["--checkpoints", str(folder / "checkpoints"), "--checkpoint-seconds", str(settings.checkpoint_seconds)]
    if settings.feature_cache_bytes:
        found += ["--cache", str(settings.feature_cache), "--cache-bytes", str(settings.feature_cache_bytes)]
    if (base := _base_weights(held, order, folder)) is not None:
        found += ["--base-weights", str(base)]
    if order.champion and (weights := _fetched(held, order.champion.weights_sha256, folder)) is not None:
        found += ["--champion", str(weights)]
    if (revision := code_revision()) is not None:
        found += ["--revision", revision]
    return found


def _base_weights(held: Held, order: Order, folder: Path) -> Path | None:
    """The file that `weights: file:NAME` or `version:N` stands for; None for other weights."""
    if order.base_sha256 is not None:
        if (weights := _fetched(held, order.base_sha256, folder)) is not None:
            return weights
        raise WorkFailed("MODEL_MISSING", "The weights of the version to begin from cannot be read. Train it again.")
    name = training_params.base_file(order.params)
    return None if name is None else _file(name, held.resources.settings.weights_dir)


def _fetched(held: Held, sha256: str, folder: Path) -> Path | None:
    """A version's weights; None where they are not stored."""
    try:
        path = held.resources.artifacts.fetch(sha256, folder)
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


def _file(name: str, folder: Path | None) -> Path:
    # A name with a path in it would let a client read what it has no business with. The API refuses it as well.
    plain = Path(name).name == name
    if plain and folder is not None and (folder / name).is_file():
        return folder.absolute() / name
    where = "the folder that RENALQ_WEIGHTS_DIR names" if folder else "a folder, and its path into RENALQ_WEIGHTS_DIR"
    detail = (
        f"weights: the workers have no file {Path(name).name}. Put it into {where}, or set weights: imagenet or none."
    )
    raise WorkFailed(WeightsMissing.code, detail)


def _write_config(held: Held, order: Order, folder: Path) -> tuple[Path, Path]:
    """The child's config and params files: those of `config/config.yaml`, with paths of this attempt's own."""
    root = folder / "artifacts"
    archive = folder / "data.zip"
    if order.archive_sha256 is not None:
        archive.symlink_to(held.resources.artifacts.fetch(order.archive_sha256, folder))
    config = PipelineConfig.below(root)
    scans = {"source_url": order.source_url, "local_data_file": archive}
    config = config.model_copy(update={"data_ingestion": config.data_ingestion.model_copy(update=scans)})
    files = folder / "config.yaml", folder / "params.yaml"
    for path, content in zip(files, (config.model_dump(mode="json", by_alias=True), order.params), strict=True):
        path.write_text(yaml.safe_dump(content))
    return files
