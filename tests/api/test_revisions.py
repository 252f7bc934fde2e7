"""A job's revision, its ETag, moves exactly when something changes that a client can see."""

import datetime as dt
import uuid
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from api.resources.jobs.schemas import JobSchema
from jobs.db import Sessions, listening
from jobs.events.job_events import JOBS_CHANNEL
from jobs.results.queries import JobView
from jobs.tables import Job, new_id
from jobs.tables.job import NOT_SHOWN
from tests.builders import make_job

ERROR = {"code": "STALLED", "detail": "It stands still.", "retryable": True}
NOW = dt.datetime(2026, 11, 30, tzinfo=dt.UTC)
COLUMNS = {column.name: attribute for attribute, column in Job.__mapper__.columns.items() if not column.primary_key}
OTHER: dict[str, Any] = {
    "state": "running",
    "kind": "ingest",
    "stages": [{"name": "training", "state": "running"}],
    "engines": ["torch-fp32"],
    "error": ERROR,
    "warnings": [ERROR],
    "reproduction": {"of": str(new_id())},
    "params": {"epochs": 9},
    "metrics": {"f1": 0.9},
    "operating_point": {"positive": ["Tumor"], "threshold": 0.3},
    "metadata": {"study": "7"},
}


def other(name: str) -> Any:
    """A value that the column does not have."""
    column = Job.__table__.c[name]
    kind = column.type.python_type
    found = {str: "x", int: 9, float: 0.5, uuid.UUID: new_id(), dt.datetime: NOW}
    return OTHER[name] if name in OTHER else found[kind]


@pytest.fixture
def loose(sessions: Sessions) -> Session:
    """A session that may write anything into jobs, and is rolled back."""
    with sessions() as session:
        names = "SELECT conname FROM pg_constraint WHERE conrelid = 'jobs'::regclass AND contype IN ('c', 'f')"
        for name in session.scalars(text(names)).all():
            session.execute(text(f"ALTER TABLE jobs DROP CONSTRAINT {name}"))
        yield session  # type: ignore[misc]


def test_the_columns_that_clients_see_are_those_that_move_the_revision(
    app: Flask, loose: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.extensions["renalq"].settings, "mlflow_public_url", "https://mlflow.example")
    shown, moving = set(), set()
    for name, attribute in COLUMNS.items():
        job = make_job(loose)
        job.state = "queued" if name == "state" else "failed"
        loose.flush()
        loose.refresh(job)
        with app.test_request_context("/"):
            before, revision = JobSchema().dump(JobView(job, NOW, None)), job.revision
            loose.execute(update(Job).where(Job.id == job.id).values({attribute: other(name)}))
            loose.refresh(job)
            after = JobSchema().dump(JobView(job, NOW, None))
        if before != after:
            shown.add(name)
        if job.revision != revision:
            moving.add(name)
    assert shown == set(COLUMNS) - NOT_SHOWN
    assert moving == shown


def test_a_change_that_nobody_sees_notifies_nobody(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
    with listening(sessions.kw["bind"], JOBS_CHANNEL) as bell:
        for values in ({"tracked_at": NOW}, {"progress": 0.0}, {"progress": 0.5}):
            with sessions.begin() as session:
                session.execute(update(Job).where(Job.id == job.id).values(values))
        assert bell.wait(5) == [str(job.id)]
