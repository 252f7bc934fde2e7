"""A training job: the dataset comes out of storage, `python -m ml run` does the work, its words become rows."""

import datetime as dt
import json
import mimetypes
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog
import yaml
from sqlalchemy.orm import Session

from jobs import checkpoints, lifecycle, registry
from jobs.errors import LeaseLost
from jobs.states import Stage
from jobs.tables import Artifact, Checkpoint, Dataset, Job, Json
from ml import events
from ml.errors import BadCheckpoint, BadParams
from ml.params import parse_params
from worker import resuming, tracking
from worker.child import Child, child
from worker.interrupts import CancelRequested
from worker.provenance import code_revision, environment
from worker.resuming import CheckpointRefused
from worker.running import Held, WorkFailed

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
    """Run the child from the furthest checkpoint that it takes; each try has a folder of its own."""
    for number, checkpoint in enumerate(resuming.candidates(held, order.checkpoints, folder)):
        with suppress(CheckpointRefused), _subfolder(folder, number) as own:
            return _run_child(held, order, run, own, checkpoint)
    raise AssertionError("from the beginning there is nothing to refuse")


@contextmanager
def _subfolder(folder: Path, number: int) -> Iterator[Path]:
    own = folder / str(number)
    own.mkdir()
    try:
        yield own
    except CheckpointRefused:
        shutil.rmtree(own, ignore_errors=True)
        raise


def _run_child(held: Held, order: Order, run: tracking.Run, folder: Path, checkpoint: Path | None) -> Told:
    config, params = _write_config(held, order, folder)
    arguments = ["run", "--config", str(config), "--params", str(params), "--events"]
    pause = held.resources.settings.checkpoint_seconds
    arguments += ["--checkpoints", str(folder / "checkpoints"), "--checkpoint-seconds", str(pause)]
    arguments += [] if checkpoint is None else ["--resume", str(checkpoint)]
    log_file = folder / "training.log"
    told = Told()
    with child(arguments, held.resources.settings.cancel_grace_seconds, log_file) as process:
        held.when_interrupted(process.stop)
        try:
            for event in process.events():
                _hear(held, run, told, event)
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
        if said.code == BadCheckpoint.code:
            raise CheckpointRefused
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


# --- what the child says becomes rows ---


def _hear(held: Held, run: tracking.Run, told: Told, event: events.Event) -> None:
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
            resuming.keep(held, event)
        case events.Resumed():
            resuming.go_on(held, event.epoch)
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

    held.finish(end, and_follow=False)  # MLflow is still to be told: another unit would wait without a beat


def _artifact(held: Held, name: str, sha256: str, size: int) -> Artifact:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    job_id, tenant_id = held.claim.job_id, held.claim.tenant_id
    return Artifact(job_id=job_id, name=name, tenant_id=tenant_id, sha256=sha256, size=size, media_type=kind)
