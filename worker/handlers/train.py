"""A training job: fetch the dataset, run its pipeline in a child process, write the events as rows."""

import mimetypes
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.db import NOW
from jobs.errors import LeaseLost
from jobs.models import promotion, registry, reproduction
from jobs.models.comparison import PairedScores
from jobs.models.gate import GatePolicy
from jobs.queue import lifecycle
from jobs.tables import Artifact, Json
from ml.runtime import events
from ml.runtime.errors import BadCheckpoint, PipelineError
from ml.spec.pipeline import PipelineSpec
from worker.execution.child import Child, child
from worker.execution.unit import CancelRequested, UnitLease, WorkFailed
from worker.handlers import checkpoints, training_request
from worker.handlers.checkpoints import CheckpointRefused
from worker.handlers.training_request import TrainingRequest
from worker.tracking import backfill, live
from worker.tracking.provenance import BASE_WEIGHTS, code_revision, environment
from worker.tracking.runs import describe

log = structlog.get_logger()

END_SECONDS = 1.0
"""What the end takes when the child is done: its files go into the store and to MLflow."""
CREEP = 0.005
"""The share of the rest by which progress grows at least with each report."""


@dataclass
class RunState:
    """What the child has reported so far."""

    spec: PipelineSpec
    done: float = 0.0
    """Fraction of the first stage that was done before the child began."""
    stages: list[Json] = field(default_factory=list)
    evaluated: events.Evaluated | None = None
    finished: events.Finished | None = None
    failed: events.Failed | None = None
    begun_at: float = 0.0
    """The job's progress when this attempt began: earlier ones may have got far."""
    started: float = field(default_factory=time.monotonic)
    told: float = 0.0
    is_timed: bool = False
    """Whether the pipeline reckons its time. Then the shares that its stages have by the spec do not count."""

    @classmethod
    def of(cls, spec: PipelineSpec, begun_at: float = 0.0, done: float = 0.0) -> "RunState":
        """Before the first event: all stages wait."""
        waiting = {"state": "queued", "started_at": None, "finished_at": None}
        return cls(spec, done, [{"name": stage.name, **waiting} for stage in spec.stages], begun_at=begun_at)

    def progress(self, stage: str, fraction: float, left: float | None = None) -> float | None:
        """The job's progress when so much of a stage is done; None: nobody knows it now. `left`: seconds until the
        attempt ends, if they are known."""
        if left is None:
            if stage == self.spec.stages[0].name:
                fraction = self.done + (1 - self.done) * fraction
            return None if self.is_timed else self.spec.progress(stage, fraction)
        self.is_timed = True
        passed = time.monotonic() - self.started
        share = passed / (passed + left) if passed + left > 0 else 0.0
        found = self.begun_at + (1 - self.begun_at) * share
        # What takes longer than was reckoned goes on nevertheless, slower and slower. 1 is for the job's end alone.
        self.told = min(max(found, self.told + CREEP * (1 - self.told)), 0.999)
        return self.told


def run_training(unit: UnitLease) -> None:
    """Train, and finish the unit.

    Raises:
        WorkFailed: the child reported an error, or died.
    """
    request = unit.in_transaction(lambda session: training_request.read(session, unit))
    what = describe(request.spec, unit.claim.job_id, request.params, request.dataset_digest, name=request.name)
    run = live.Run(unit.resources.settings, what, lambda run_id: _save_run_id(unit, run_id), request.mlflow_run_id)
    try:
        with unit.workspace() as folder:
            request = training_request.with_source(unit, request, folder)
            state = _follow_child(unit, request, run, folder)
            _finish(unit, request, run, state)
            run.end("FINISHED", live.END_TIMEOUT_SECONDS)  # while the files still stand
    except Exception:
        run.end("KILLED" if unit.interrupted else "FAILED")  # no waiting: the job's end is not written yet
        raise
    if run.is_complete:
        job_id = unit.claim.job_id
        unit.in_transaction(lambda session: backfill.mark_tracked(session, job_id, run.run_id), ignore_interrupts=True)


def _save_run_id(unit: UnitLease, run_id: str) -> None:
    with suppress(LeaseLost):  # the heartbeat interrupts the unit
        unit.report(mlflow_run_id=run_id)


# --- the child ---


def _follow_child(unit: UnitLease, request: TrainingRequest, run: live.Run, folder: Path) -> RunState:
    """Run the child from the latest checkpoint that it accepts; each try has its own folder."""
    for number, checkpoint in enumerate(checkpoints.candidates(unit, request.checkpoints, folder)):
        with suppress(CheckpointRefused), _subfolder(folder, number) as own:
            return _run_child(unit, request, run, own, checkpoint)
    raise AssertionError("a start without a checkpoint cannot be refused")


@contextmanager
def _subfolder(folder: Path, number: int) -> Iterator[Path]:
    own = folder / str(number)
    own.mkdir()
    try:
        yield own
    except CheckpointRefused:
        shutil.rmtree(own, ignore_errors=True)
        raise


def _run_child(
    unit: UnitLease, request: TrainingRequest, run: live.Run, folder: Path, checkpoint: Path | None
) -> RunState:
    job = training_request.write(unit, request, folder, checkpoint)
    log_file = folder / "training.log"
    state = RunState.of(request.spec, request.progress, request.downloaded)
    with child(job, unit.resources.settings.cancel_grace_seconds, log_file) as process:
        unit.when_interrupted(process.stop)
        run.measure(process.pid)
        try:
            for event in process.events():
                _handle_event(unit, run, state, event)
            unit.check()
            _raise_if_failed(unit, state, process, log_file)
        except (WorkFailed, CancelRequested) as why:
            _close_stage(unit, state, "cancelled" if isinstance(why, CancelRequested) else "failed")
            raise
        finally:
            run.measure(None)
    return state


def _close_stage(unit: UnitLease, state: RunState, new_state: str) -> None:
    """Set the stage in which the child ended to this state."""
    for stage in state.stages:
        if stage["state"] == "running":
            _set_stage(unit, state, stage["name"], new_state, "finished_at")


def _raise_if_failed(unit: UnitLease, state: RunState, process: Child, log_file: Path) -> None:
    if state.failed is not None:
        failed = state.failed
        if failed.code == BadCheckpoint.code:
            raise CheckpointRefused
        if failed.code == PipelineError.code:
            _keep_log(unit, log_file)  # its detail refers to the log
        raise WorkFailed(failed.code, failed.detail, failed.retryable)
    code = process.exit_code()
    if state.finished is None:
        _keep_log(unit, log_file)
        detail = f"The training process ended with code {code} before it was done; it may lack memory."
        raise WorkFailed("TRAINING_DIED", detail, retryable=True)


def _keep_log(unit: UnitLease, log_file: Path) -> None:
    """Copy the child's stderr to the worker's folder, for the operator; clients cannot read it."""
    kept = unit.resources.settings.work / f"{unit.claim.job_id}-attempt-{unit.claim.attempt}.log"
    shutil.copyfile(log_file, kept)
    log.error("training_died", log=str(kept))


# --- events of the child become rows ---


def _handle_event(unit: UnitLease, run: live.Run, state: RunState, event: events.Event) -> None:
    match event:
        case events.StageStarted():
            _set_stage(unit, state, event.stage, "running", "started_at", state.progress(event.stage, 0.0))
        case events.StageFinished():
            _set_stage(unit, state, event.stage, "succeeded", "finished_at", state.progress(event.stage, 1.0))
        case events.Progress():
            left = None if event.left is None else event.left + END_SECONDS
            unit.report(progress=state.progress(event.stage, event.fraction, left), seconds_left=left)
        case events.Evaluated():
            state.evaluated = event
            run.log_scores(event.metrics)
        case events.Finished():
            state.finished = event
        case events.Failed():
            state.failed = event
        case _:
            _handle_epoch_event(unit, run, event)


def _handle_epoch_event(unit: UnitLease, run: live.Run, event: events.Event) -> None:
    match event:
        case events.Steps():
            run.log_steps(event)  # MLflow only: as rows they would be most of the database
        case events.Epoch() | events.Round():
            unit.report(event=("epoch", event.row()))
            run.log_epoch(event)
        case events.Checkpointed():
            checkpoints.store(unit, event)
        case events.Resumed():
            checkpoints.record_resume(unit, event.epoch)


def _set_stage(
    unit: UnitLease, state: RunState, name: str, new_state: str, moment: str, progress: float | None = None
) -> None:
    def write(session: Session) -> None:
        at = session.execute(select(NOW)).scalar_one().isoformat().replace("+00:00", "Z")
        for stage in state.stages:
            if stage["name"] == name:
                stage |= {"state": new_state, moment: at}
        event = "stage", {"stage": name, "state": new_state}
        lifecycle.report(session, unit.claim, stage=name, stages=state.stages, progress=progress, event=event)

    unit.in_transaction(write)


# --- the end ---


def _finish(unit: UnitLease, request: TrainingRequest, run: live.Run, state: RunState) -> None:
    """Store the files, then write the version, the artifacts and the job's end in ONE transaction."""
    assert state.finished is not None
    assert state.evaluated is not None
    finished, evaluated = state.finished, state.evaluated
    weights = Path(finished.model_path)
    files = {name: Path(path) for name, path in finished.artifacts.items()}
    run.log_artifacts(files, weights)
    store = unit.resources.artifacts
    stored = {name: store.put_file(path) for name, path in files.items()}
    blob = stored[request.spec.model_file] = store.put_file(weights)
    new = _new_model(request, evaluated, finished, blob.sha256, run.run_id)
    run.log_weights(str(new.dataset_digest), new.weights_sha256, new.environment.get(BASE_WEIGHTS))

    def end(session: Session) -> None:
        policy = GatePolicy.of(unit.resources.settings)
        promotion.register(session, unit.claim, new, policy, _shared_scores(request, evaluated.champion))
        reproduction.save_comparison(session, unit.claim)
        for name, kept in stored.items():
            session.add(_artifact(unit, name, kept.sha256, kept.size))
        lifecycle.succeed(session, unit.claim, metrics=evaluated.metrics, device_seconds=finished.device_seconds)

    unit.finish(end, claim_next=False)  # MLflow comes next: a claimed unit would wait without a heartbeat


def _new_model(
    request: TrainingRequest,
    evaluated: events.Evaluated,
    finished: events.Finished,
    weights_sha256: str,
    run_id: str | None,
) -> registry.NewModel:
    return registry.NewModel(
        weights_sha256=weights_sha256,
        classes=list(evaluated.metrics.get("classes", ())),
        params=request.params,
        metrics=evaluated.metrics,
        dataset_digest=finished.dataset_digest or request.dataset_digest,
        code_revision=code_revision(),
        environment=_trained_on(request, finished),
        mlflow_run_id=run_id,
        reference=evaluated.reference,
        scan_scores=evaluated.scan_scores,
    )


def _shared_scores(request: TrainingRequest, comparison: Json | None) -> PairedScores | None:
    """Scores of the new network and of the champion of the training's start, on the same scans."""
    if request.champion is None:
        return None
    if comparison is None:
        return PairedScores(request.champion.id, "its weights are not stored any more")
    scores = {name: comparison[name] for name in ("test_digest", "scans", "candidate", "champion")}
    return PairedScores(request.champion.id, comparison["why"], **scores, paired=comparison.get("paired"))


def _trained_on(request: TrainingRequest, finished: events.Finished) -> Json:
    """What determines the model's numbers besides code, data and parameters."""
    base = {BASE_WEIGHTS: request.base_sha256} if request.base_sha256 else {}
    return {**environment(request.spec.packages), **finished.environment, **base}


def _artifact(unit: UnitLease, name: str, sha256: str, size: int) -> Artifact:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    job_id, tenant_id = unit.claim.job_id, unit.claim.tenant_id
    return Artifact(job_id=job_id, name=name, tenant_id=tenant_id, sha256=sha256, size=size, media_type=kind)
