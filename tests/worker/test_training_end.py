"""A training's end in a real worker, with a child that only says what a training says (see tests/faults/sabotage)."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from jobs import reproduction
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import JobEvent, ModelVersion
from tests.builders import TENANT
from tests.faults.sabotage import Sabotage
from tests.faults.work import training
from tests.processes import Stack, stack
from worker.provenance import environment


@pytest.fixture
def processes(settings: Settings, sessions: Sessions, tmp_path: Path) -> Iterator[Stack]:
    """A dispatcher, and a worker whose trainings learn nothing and end at once."""
    plan = Sabotage(tmp_path)
    plan.training(seconds=0)
    with stack(settings, sessions, "dispatcher") as started:
        started.start("train", environ=plan.environ())
        yield started


def test_a_training_is_reproduced_and_compared_with_what_it_was(processes: Stack) -> None:
    original = processes.wait_for(training(processes, epochs=2, seed=7))
    assert original.state == "succeeded", (original.error, processes.logs())
    with processes.sessions.begin() as session:
        again = reproduction.reproduce(session, TENANT, original.id).id
    job = processes.wait_for(again)
    assert job.state == "succeeded", (job.error, processes.logs())
    assert job.reproduction is not None
    assert (job.reproduction["of"], job.reproduction["matches"]) == (str(original.id), True)
    assert job.reproduction["same_environment"]
    assert job.reproduction["same_dataset"]
    with processes.sessions() as session:
        first, second = session.scalars(select(ModelVersion).order_by(ModelVersion.version)).all()
        assert second.params == first.params, "complete, with every default"
        assert (second.params["seed"], second.champion) == (7, False)
        assert second.environment == environment()
        types = session.scalars(select(JobEvent.type).where(JobEvent.job_id == again).order_by(JobEvent.id)).all()
        assert types[-2:] == ["reproduced", "succeeded"]


def test_weights_that_are_not_there_end_the_job_with_the_remedy(processes: Stack) -> None:
    job_id: uuid.UUID = training(processes, weights="file:mine.pth")
    job = processes.wait_for(job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("WEIGHTS_MISSING", 1)
    assert "mine.pth" in job.error["detail"]
