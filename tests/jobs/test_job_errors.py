"""Where an error is shown: on the job only if the job failed, else on its scans, or as a warning."""

import datetime as dt

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from jobs.tables import Job, ScanResult
from tests.builders import BROKEN, TENANT, claim, make_job, make_scan, outcomes_of, units_of
from tests.jobs.checker import faults

NOT_EXPLAINED = {"code": "NOT_EXPLAINED", "detail": "The worker's log says why.", "retryable": False}


def end_units(session: Session, job: Job, *failing: int, explain: bool = False) -> None:
    """All its units end, of which these fail."""
    for number, unit in enumerate(units_of(session, job)):
        held = claim(session, unit)
        if number in failing:
            lifecycle.fail(session, held, {**BROKEN, "detail": f"Unit {number} broke."})
        else:
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=explain)
    session.refresh(job)


def test_job_of_which_a_part_failed_has_no_error(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20)
        end_units(session, job, 0)
        assert (job.state, job.error, job.warnings) == ("partially_succeeded", None, [])
        assert session.get_one(ScanResult, (job.id, 0)).error is not None
        assert not faults(session)


def test_job_that_failed_has_the_error_of_its_last_unit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20)
        end_units(session, job, 0, 1)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["detail"] == "Unit 1 broke."


@pytest.mark.parametrize("scans", [1, 20])
def test_failed_explanations_are_a_warning_of_a_job_that_succeeds(sessions: Sessions, scans: int) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=scans)
        end_units(session, job, explain=True)
        for unit in [unit for unit in units_of(session, job) if unit.explains]:
            lifecycle.fail(session, claim(session, unit), NOT_EXPLAINED)
        session.refresh(job)
        assert (job.state, job.error, job.warnings) == ("succeeded", None, [NOT_EXPLAINED])
        assert not faults(session)


def test_broken_scans_end_by_the_clock_of_postgres(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> "Wrong":
            return cls(2001, 1, 1, tzinfo=tz)

    monkeypatch.setattr(dt, "datetime", Wrong)
    with sessions.begin() as session:
        scans = [NewResult(make_scan(session).id), NewResult(None, error=BROKEN)]
        job = submit(session, NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH), scans)
        ago = select(func.clock_timestamp() - ScanResult.finished_at).where(ScanResult.job_id == job.id)
        (age,) = [found for found in session.scalars(ago) if found is not None]
        assert age < dt.timedelta(minutes=1)
