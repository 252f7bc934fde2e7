"""A training job: the dataset comes out of storage, `python -m ml train` does the work, its words become rows."""

import datetime as dt
import json
import mimetypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from jobs.errors import LeaseLost
from jobs.models import registry, reproduction
from jobs.models.comparison import Measured
from jobs.models.gate import Policy
from jobs.queue import lifecycle
from jobs.states import Stage
from jobs.tables import Artifact, Json
from ml.runtime import events
from ml.runtime.errors import BadCheckpoint, PipelineError
from worker.execution.child import Child, child
from worker.execution.interrupts import CancelRequested
from worker.execution.unit import Held, WorkFailed
from worker.handlers import checkpoints, training_request
from worker.handlers.checkpoints import CheckpointRefused
from worker.handlers.training_request import Order
from worker.tracking import backfill, live
from worker.tracking.provenance import BASE_WEIGHTS, code_revision, environment, of_model
from worker.tracking.runs import WEIGHTS, describe

log = structlog.get_logger()

# How much of a training's time each stage takes, seen on CPU; only the progress bar uses it.
WEIGHT = {
    Stage.DATA_INGESTION: 0.05,
    Stage.PREPARE_BASE_MODEL: 0.05,
    Stage.TRAINING: 0.80,
    Stage.EVALUATION: 0.10,  # intervals, plots and the report
}


@dataclass
class Told:
    """What the child has said so far."""

    stages: list[Json] = field(default_factory=lambda: [_queued(stage) for stage in Stage])
    evaluated: events.Evaluated | None = None
    finished: events.Finished | None = None
    failed: events.Failed | None = None


def _queued(stage: Stage) -> Json:
    return {"name": stage.value, "state": "queued", "started_at": None, "finished_at": None}


def run_training(held: Held) -> None:
    """Train, and end the unit well.

    Raises:
        WorkFailed: the child said why it could not, or died.
    """
    order = held.in_transaction(lambda session: training_request.read(session, held))
    what = describe(held.claim.job_id, order.params, order.dataset_digest)
    run = live.Run(held.resources.settings, what, lambda run_id: _tell_run(held, run_id), order.mlflow_run_id)
    try:
        with held.workspace() as folder:
            told = _follow_child(held, order, run, folder)
            _finish(held, order, run, told)
            run.end("FINISHED", live.PATIENCE)  # while the files still stand
    except Exception:
        run.end("KILLED" if held.interrupted else "FAILED")  # waits for nobody: the job's end is still to be written
        raise
    if run.is_complete:
        job_id = held.claim.job_id
        held.in_transaction(lambda session: backfill.mark(session, job_id, run.run_id), to_the_end=True)


def _tell_run(held: Held, run_id: str) -> None:
    with suppress(LeaseLost):  # the watch says so to the one who works
        held.report(mlflow_run_id=run_id)


# --- the child ---


def _follow_child(held: Held, order: Order, run: live.Run, folder: Path) -> Told:
    """Run the child from the furthest checkpoint that it takes; each try has a folder of its own."""
    for number, checkpoint in enumerate(checkpoints.candidates(held, order.checkpoints, folder)):
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


def _run_child(held: Held, order: Order, run: live.Run, folder: Path, checkpoint: Path | None) -> Told:
    arguments = training_request.arguments(held, order, folder)
    arguments += [] if checkpoint is None else ["--resume", str(checkpoint)]
    log_file = folder / "training.log"
    told = Told()
    with child(arguments, held.resources.settings.cancel_grace_seconds, log_file) as process:
        held.when_interrupted(process.stop)
        run.watch(process.pid)
        try:
            for event in process.events():
                _hear(held, run, told, event)
            held.check()
            _judge_end(held, told, process, log_file)
        except (WorkFailed, CancelRequested) as why:
            _close_stage(held, told, "cancelled" if isinstance(why, CancelRequested) else "failed")
            raise
        finally:
            run.watch(None)
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
        if said.code == PipelineError.code:
            _keep_log(held, log_file)  # its detail says that the log has more
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


# --- what the child says becomes rows ---


def _hear(held: Held, run: live.Run, told: Told, event: events.Event) -> None:
    match event:
        case events.StageStarted():
            _stage(held, told, event.stage, "running", "started_at", progress=_progress(event.stage, 0.0))
        case events.StageFinished():
            _stage(held, told, event.stage, "succeeded", "finished_at", progress=_progress(event.stage, 1.0))
        case events.Progress():
            held.report(progress=_progress(event.stage, event.fraction))
        case events.Evaluated():
            told.evaluated = event
            run.final(event.metrics)
        case events.Finished():
            told.finished = event
        case events.Failed():
            told.failed = event
        case _:
            _hear_of_epochs(held, run, event)


def _hear_of_epochs(held: Held, run: live.Run, event: events.Event) -> None:
    match event:
        case events.Steps():
            run.steps(event)  # for MLflow alone: as rows they would be most of the database
        case events.Epoch():
            held.report(event=("epoch", asdict(event)))
            run.epoch(event)
        case events.Checkpointed():
            checkpoints.keep(held, event)
        case events.Resumed():
            checkpoints.go_on(held, event.epoch)


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


def _finish(held: Held, order: Order, run: live.Run, told: Told) -> None:
    """Store the files, then write version, artifacts and the job's end in ONE transaction."""
    assert told.finished is not None
    assert told.evaluated is not None
    finished, evaluated = told.finished, told.evaluated
    weights = Path(finished.model_path)
    files = {name: Path(path) for name, path in finished.artifacts.items()}
    run.artifacts(files, weights)
    store = held.resources.artifacts
    stored = {name: store.put_file(path) for name, path in files.items()}
    blob = stored[WEIGHTS] = store.put_file(weights)
    environment = _trained_on(order, weights)
    digest = json.loads(files["manifest.json"].read_text())["digest"]
    new = _new_model(order, evaluated, blob.sha256, digest, environment, run.run_id)
    run.made(str(new.dataset_digest), new.weights_sha256, new.environment.get(BASE_WEIGHTS))

    def end(session: Session) -> None:
        policy = Policy.of(held.resources.settings)
        registry.add(session, held.claim, new, policy, _measured(order, evaluated.champion))
        reproduction.write(session, held.claim)
        for name, kept in stored.items():
            session.add(_artifact(held, name, kept.sha256, kept.size))
        lifecycle.succeed(session, held.claim, metrics=evaluated.metrics, device_seconds=finished.device_seconds)

    held.finish(end, and_follow=False)  # MLflow is still to be told: another unit would wait without a beat


def _new_model(
    order: Order, evaluated: events.Evaluated, weights_sha256: str, digest: str, environment: Json, run_id: str | None
) -> registry.NewModel:
    return registry.NewModel(
        weights_sha256=weights_sha256,
        classes=list(evaluated.metrics["classes"]),
        params=order.params,
        metrics=evaluated.metrics,
        dataset_digest=digest,
        code_revision=code_revision(),
        environment=environment,
        mlflow_run_id=run_id,
        reference=evaluated.reference,
    )


def _measured(order: Order, told: Json | None) -> Measured | None:
    """How the champion of the training's start did beside the new network."""
    if order.champion is None:
        return None
    if told is None:
        return Measured(order.champion.id, "its weights are not stored any more")
    scores = {name: told[name] for name in ("test_digest", "scans", "candidate", "champion")}
    return Measured(order.champion.id, told["why"], **scores)


def _trained_on(order: Order, weights: Path) -> Json:
    """What decides the network's numbers beside code, data and parameters."""
    begun_with = {BASE_WEIGHTS: order.base_sha256} if order.base_sha256 else {}
    return {**environment(), **of_model(weights), **begun_with}


def _artifact(held: Held, name: str, sha256: str, size: int) -> Artifact:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    job_id, tenant_id = held.claim.job_id, held.claim.tenant_id
    return Artifact(job_id=job_id, name=name, tenant_id=tenant_id, sha256=sha256, size=size, media_type=kind)
