"""A training job: the dataset comes out of storage, `python -m ml run` does the work, its words become rows."""

import datetime as dt
import json
import mimetypes
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog
import yaml
from sqlalchemy.orm import Session

from jobs import checkpoints, lifecycle, queries, registry
from jobs.errors import LeaseLost
from jobs.states import Stage
from jobs.tables import Artifact, Checkpoint, Dataset, Job, Json
from ml import events
from ml.errors import BadParams
from ml.params import parse_params
from worker import tracking
from worker.child import Child, child
from worker.provenance import code_revision, environment
from worker.running import CancelRequested, Held, WorkFailed

log = structlog.get_logger()

# How much of a training's time each stage takes, seen on CPU; only the progress bar uses it.
WEIGHT = {
    Stage.DATA_INGESTION: 0.04,
    Stage.PREPARE_BASE_MODEL: 0.06,
    Stage.TRAINING: 0.85,
    Stage.EVALUATION: 0.05,
}


@dataclass(frozen=True)
class Order:
    """What is to be trained, read from the rows once; and where an attempt before this one had come to."""

    params: Json
    archive_sha256: str | None
    dataset_digest: str | None
    source_url: str | None
    mlflow_run_id: str | None
    retry_of: uuid.UUID | None
    checkpoints: Sequence[Checkpoint]


@dataclass
class Told:
    """What the child has said so far."""

    stages: list[Json] = field(default_factory=lambda: [_queued(stage) for stage in Stage])
    metrics: Json | None = None
    finished: events.Finished | None = None
    failed: events.Failed | None = None


def _queued(stage: Stage) -> Json:
    return {"name": stage.value, "state": "queued", "started_at": None, "finished_at": None}


def run_training(held: Held) -> None:
    """Train, and end the unit well.

    Raises:
        WorkFailed: the child said why it could not, or died.
    """
    order = held.in_transaction(lambda session: _read_order(session, held))
    run = tracking.Run(
        held.resources.settings, _run_of(held, order), lambda run_id: _tell_run(held, run_id), order.mlflow_run_id
    )
    try:
        with held.workspace() as folder:
            told = _follow_child(held, order, run, folder)
            _finish(held, order, run, told)
            run.end("FINISHED", tracking.PATIENCE)  # while the files still stand
    except Exception:
        run.end("KILLED" if held.interrupted else "FAILED")  # waits for nobody: the job's end is still to be written
        raise
    if run.is_complete:
        held.in_transaction(lambda session: tracking.mark(session, held.claim.job_id), to_the_end=True)


def _read_order(session: Session, held: Held) -> Order:
    job = session.get_one(Job, held.claim.job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None and job.source_url is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before the training began. Upload it again.")
    return Order(
        params=_complete(job.params),
        archive_sha256=dataset.archive_sha256 if dataset else None,
        dataset_digest=dataset.digest if dataset else None,
        source_url=job.source_url,
        mlflow_run_id=job.mlflow_run_id,
        retry_of=job.retry_of,
        checkpoints=checkpoints.latest(session, job.id, job.retry_of),
    )


def _run_of(held: Held, order: Order) -> tracking.Description:
    return tracking.describe(held.claim.job_id, order.params, order.dataset_digest)


def _complete(params: Json) -> Json:
    """The job's parameters with the defaults of `ml/params.py` beside them: what is recorded is what was used."""
    try:
        return parse_params(params).model_dump(mode="json")
    except BadParams as error:
        raise WorkFailed("BAD_PARAMS", str(error)) from error


def _tell_run(held: Held, run_id: str) -> None:
    with suppress(LeaseLost):  # the watch says so to the one who works
        held.report(mlflow_run_id=run_id)


# --- the child ---


def _follow_child(held: Held, order: Order, run: tracking.Run, folder: Path) -> Told:
    config, params = _write_config(held, order, folder)
    arguments = ["run", "--config", str(config), "--params", str(params), "--events"]
    pause = held.resources.settings.checkpoint_seconds
    arguments += ["--checkpoints", str(folder / "checkpoints"), "--checkpoint-seconds", str(pause)]
    arguments += _resume(held, order, folder)
    log_file = folder / "training.log"
    told = Told()
    with child(arguments, held.resources.settings.cancel_grace_seconds, log_file) as process:
        held.when_interrupted(process.stop)
        try:
            for event in process.events():
                _hear(held, order, run, told, event)
            held.check()
            _judge_end(held, told, process, log_file)
        except (WorkFailed, CancelRequested) as why:
            _close_stage(held, told, "cancelled" if isinstance(why, CancelRequested) else "failed")
            raise
    return told


def _close_stage(held: Held, told: Told, state: str) -> None:
    """The stage in which it ended says so."""
    for stage in told.stages:
        if stage["state"] == "running":
            _stage(held, told, stage["name"], state, "finished_at")


def _judge_end(held: Held, told: Told, process: Child, log_file: Path) -> None:
    if told.failed is not None:
        said = told.failed
        raise WorkFailed(said.code, said.detail, said.retryable)
    code = process.exit_code()
    if told.finished is None:
        _keep_log(held, log_file)
        detail = f"The training process ended with code {code} before it was done; it may lack memory."
        raise WorkFailed("TRAINING_DIED", detail, retryable=True)


def _keep_log(held: Held, log_file: Path) -> None:
    """The child's last words go to the worker's folder, for the operator; they are not the client's to read."""
    kept = held.resources.settings.work / f"{held.claim.job_id}-attempt-{held.claim.attempt}.log"
    shutil.copyfile(log_file, kept)
    log.error("training_died", log=str(kept))


def _write_config(held: Held, order: Order, folder: Path) -> tuple[Path, Path]:
    """The child's config and params files: those of `config/config.yaml`, with paths of this attempt's own."""
    root = folder / "artifacts"
    archive = folder / "data.zip"
    if order.archive_sha256 is not None:
        archive.symlink_to(held.resources.artifacts.fetch(order.archive_sha256, folder))
    config: dict[str, Any] = {
        "artifacts_root": str(root),
        "data_ingestion": {
            "root_dir": str(root / "data_ingestion"),
            "source_URL": order.source_url or "",
            "local_data_file": str(archive),
            "unzip_dir": str(root / "data_ingestion" / "images"),
        },
        "prepare_base_model": {
            "root_dir": str(root / "prepare_base_model"),
            "base_model_path": str(root / "prepare_base_model" / "base_model.safetensors"),
            "updated_base_model_path": str(root / "prepare_base_model" / "base_model_updated.safetensors"),
        },
        "training": {
            "root_dir": str(root / "training"),
            "trained_model_path": str(root / "training/model.safetensors"),
        },
        "evaluation": {"root_dir": str(root / "evaluation"), "scores_path": str(root / "evaluation" / "scores.json")},
    }
    files = folder / "config.yaml", folder / "params.yaml"
    for path, content in zip(files, (config, order.params), strict=True):
        path.write_text(yaml.safe_dump(content))
    return files


# --- checkpoints ---


def _resume(held: Held, order: Order, folder: Path) -> list[str]:
    """The child's arguments to go on from the furthest checkpoint that is whole; none where there is none."""
    for row in order.checkpoints:
        path = held.resources.artifacts.fetch_named(row.path, row.sha256, folder)
        if path is not None:
            log.info("resuming", epoch=row.epoch)
            return ["--resume", str(path)]
        log.error("checkpoint_broken", epoch=row.epoch, path=row.path)
        held.in_transaction(lambda session, row=row: checkpoints.discard(session, row.id))  # type: ignore[misc]
    return []


def _keep(held: Held, said: events.Checkpointed) -> None:
    """The child's file goes into the store; only then a row names it. A full store costs no training."""
    store = held.resources.artifacts
    path = checkpoints.path_of(held.claim, said.epoch)
    try:
        stored = checkpoints.Stored(said.epoch, path, store.take_in(Path(said.path), path))
    except OSError as error:
        log.error("checkpoint_not_kept", epoch=said.epoch, error=type(error).__name__)
        return
    for old in held.in_transaction(lambda session: checkpoints.keep(session, held.claim, stored)):
        store.remove_named(old)


def _continue(held: Held, order: Order, epoch: int) -> None:
    """Say that the training goes on. A retry is another job: it takes over the epochs of the one that it retries."""
    held.report(event=("resumed", {"epoch": epoch}))

    def take_over(session: Session) -> None:
        if order.retry_of is not None and not queries.epochs(session, held.claim.job_id):
            for data in queries.epochs(session, order.retry_of)[:epoch]:
                lifecycle.report(session, held.claim, event=("epoch", data))

    held.in_transaction(take_over)


# --- what the child says becomes rows ---


def _hear(held: Held, order: Order, run: tracking.Run, told: Told, event: events.Event) -> None:
    match event:
        case events.StageStarted():
            _stage(held, told, event.stage, "running", "started_at", progress=_progress(event.stage, 0.0))
        case events.StageFinished():
            _stage(held, told, event.stage, "succeeded", "finished_at", progress=_progress(event.stage, 1.0))
        case events.Progress():
            held.report(progress=_progress(event.stage, event.fraction))
        case events.Epoch():
            held.report(event=("epoch", asdict(event)))
            run.epoch(event)
        case events.Checkpointed():
            _keep(held, event)
        case events.Resumed():
            _continue(held, order, event.epoch)
        case events.Evaluated():
            told.metrics = event.metrics
            run.final(event.metrics)
        case events.Finished():
            told.finished = event
        case events.Failed():
            told.failed = event


def _stage(held: Held, told: Told, name: str, state: str, moment: str, progress: float | None = None) -> None:
    for stage in told.stages:
        if stage["name"] == name:
            stage |= {"state": state, moment: dt.datetime.now(dt.UTC).isoformat().replace("+00:00", "Z")}
    held.report(stage=name, stages=told.stages, progress=progress, event=("stage", {"stage": name, "state": state}))


def _progress(stage: str, fraction: float) -> float:
    """The job's progress, 0–1, at a fraction of a stage."""
    stages = list(Stage)
    before = sum(WEIGHT[earlier] for earlier in stages[: stages.index(Stage(stage))])
    return min(before + WEIGHT[Stage(stage)] * fraction, 0.999)  # 1 is for the end alone


# --- the end ---


def _finish(held: Held, order: Order, run: tracking.Run, told: Told) -> None:
    """Store the files, then write version, artifacts and the job's end in ONE transaction."""
    assert told.finished is not None
    assert told.metrics is not None
    weights = Path(told.finished.model_path)
    files = {name: Path(path) for name, path in told.finished.artifacts.items()}
    run.artifacts([files[name] for name in tracking.PUBLIC], weights)
    store = held.resources.artifacts
    stored = {name: store.put_file(path) for name, path in files.items()}
    blob = stored["model.safetensors"] = store.put_file(weights)
    new = registry.NewModel(
        weights_sha256=blob.sha256,
        classes=list(told.metrics["classes"]),
        params=order.params,
        metrics=told.metrics,
        dataset_digest=json.loads(files["manifest.json"].read_text())["digest"],
        code_revision=code_revision(),
        environment=environment(),
        mlflow_run_id=run.run_id,
    )

    def end(session: Session) -> None:
        registry.add(session, held.claim, new, held.resources.settings.promote_min_f1)
        for name, kept in stored.items():
            session.add(_artifact(held, name, kept.sha256, kept.size))
        assert told.finished is not None
        lifecycle.succeed(session, held.claim, metrics=told.metrics, device_seconds=told.finished.device_seconds)

    held.in_transaction(end, to_the_end=True)


def _artifact(held: Held, name: str, sha256: str, size: int) -> Artifact:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    job_id, tenant_id = held.claim.job_id, held.claim.tenant_id
    return Artifact(job_id=job_id, name=name, tenant_id=tenant_id, sha256=sha256, size=size, media_type=kind)
