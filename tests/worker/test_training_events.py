"""What a training's child says: what becomes a row, and what only MLflow is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select

from jobs.db import NOW
from jobs.tables import Job, JobEvent, Unit
from ml.runtime import events
from ml.spec.registry import spec_of
from tests.worker.conftest import Hold
from worker.execution.child import Child
from worker.execution.unit import UnitLease, WorkFailed
from worker.handlers.train import RunState, _handle_event, _raise_if_failed
from worker.tracking.live import Run


@dataclass
class Listener:
    """Stands where the MLflow run stands, and notes what it is told."""

    heard: list[Any] = field(default_factory=list)

    def log_steps(self, steps: events.Steps) -> None:
        self.heard.append(steps)

    def log_epoch(self, epoch: events.Epoch) -> None:
        self.heard.append(epoch)

    def log_scores(self, metrics: dict[str, Any]) -> None:
        self.heard.append(metrics)


def hear(unit: UnitLease, *said: events.Event) -> tuple[RunState, list[Any], list[JobEvent], int]:
    """What is known, what MLflow was told, the rows that came of it, and by how much the job's revision grew."""
    told, listener = RunState.of(spec_of("image")), Listener()
    before = _revision(unit)
    for event in said:
        _handle_event(unit, cast(Run, listener), told, event)
    with unit.resources.sessions() as session:
        mine = select(JobEvent).where(
            JobEvent.job_id == unit.claim.job_id, JobEvent.type.not_in(["submitted", "claimed"])
        )
        return told, listener.heard, list(session.scalars(mine.order_by(JobEvent.id))), _revision(unit) - before


def _revision(unit: UnitLease) -> int:
    with unit.resources.sessions() as session:
        return session.get_one(Job, unit.claim.job_id).revision


def test_steps_are_for_mlflow_alone(hold: Hold) -> None:
    steps = [events.Steps(1, first, [0.5] * 10, 0.01) for first in (1, 11, 21)]
    _, heard, rows, changes = hear(hold(), *steps)
    assert heard == steps
    assert (rows, changes) == ([], 0)


def test_an_epoch_is_a_row_with_its_phase_and_f1(hold: Hold) -> None:
    epoch = events.Epoch(1, 2, 0.7, 0.5, 0.6, 0.75, 0.01, 3.5, val_f1=0.8, phase="fine_tune")
    _, heard, rows, _ = hear(hold(), epoch)
    assert heard == [epoch]
    assert [(row.type, row.data["val_f1"], row.data["phase"]) for row in rows] == [("epoch", 0.8, "fine_tune")]


def test_scores_and_the_end_are_kept_for_the_one_transaction_that_ends_the_job(hold: Hold) -> None:
    told, heard, rows, changes = hear(hold(), events.Evaluated({"f1": 0.9}), events.Finished("model.safetensors"))
    assert (told.evaluated, told.finished) == (events.Evaluated({"f1": 0.9}), events.Finished("model.safetensors"))
    assert heard == [{"f1": 0.9}]
    assert (rows, changes) == ([], 0)


def test_the_log_is_kept_for_an_internal_error_and_not_for_a_clients_mistake(hold: Hold, tmp_path: Path) -> None:
    unit, log_file = hold(), tmp_path / "training.log"
    log_file.write_text("Traceback …")
    unit.resources.settings.work.mkdir(parents=True)
    for code, kept in (("BAD_DATASET", 0), ("INTERNAL", 1)):
        with pytest.raises(WorkFailed):
            _raise_if_failed(
                unit, RunState(spec_of("image"), failed=events.Failed(code, "why")), cast(Child, None), log_file
            )
        assert len(list(unit.resources.settings.work.glob("*.log"))) == kept


# --- progress ---


def job_of(unit: UnitLease) -> Job:
    with unit.resources.sessions() as session:
        return session.get_one(Job, unit.claim.job_id)


def test_without_a_reckoning_the_stages_shares_are_the_progress(hold: Hold) -> None:
    unit = hold()
    hear(unit, events.StageStarted("training"), events.Progress("training", 0.5))
    assert job_of(unit).progress == pytest.approx(0.5)


def test_progress_is_the_share_of_the_time_where_the_pipeline_reckons_it(hold: Hold) -> None:
    unit = hold()
    told = RunState.of(spec_of("image"))
    told.started -= 30
    for event in (
        events.StageStarted("training"),
        events.Progress("training", 0.9, left=67.0),
        events.StageFinished("training", 1.0),
    ):
        _handle_event(unit, cast(Run, Listener()), told, event)
    assert job_of(unit).progress == pytest.approx(0.3, abs=0.01), "of 30 s, 67 s and 3 s for the end"
    with unit.resources.sessions() as session:
        (running,) = session.scalars(select(Unit).where(Unit.job_id == unit.claim.job_id))
        assert 65 < (running.expected_at - session.scalar(select(NOW))).total_seconds() <= 70


def test_another_attempt_goes_on_from_where_the_first_one_was(hold: Hold) -> None:
    told = RunState.of(spec_of("image"), begun_at=0.6)
    told.started -= 10
    assert told.progress("training", 0.0, left=30.0) == pytest.approx(0.7, abs=0.01)
    assert told.progress("training", 0.0, left=0.0) == 0.999


def test_progress_moves_even_when_the_end_goes_away(hold: Hold) -> None:
    told = RunState.of(spec_of("image"))
    told.started -= 10
    found = [told.progress("evaluation", 0.9, left=left) for left in (2.0, 4.0, 8.0, 16.0)]
    assert found == sorted(set(found))
