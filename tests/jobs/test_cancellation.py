"""A large cancelled job ends in the background, batch by batch; a small one at once."""

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.db import Sessions, listening
from jobs.events.job_events import CANCELLATION, UNITS_CHANNEL
from jobs.queue import completion, leases, lifecycle
from jobs.states import JobKind, ResultState, UnitState
from jobs.tables import Job, JobEvent, ScanResult, TenantLoad, Unit
from tests.builders import TENANT, TRANSIENT, claim, make_job, outcomes_of, units_of
from tests.jobs.checker import faults


@pytest.fixture
def large(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A batch of 40 scans in 8 units, of which one has succeeded and one runs; 10 scans are many."""
    monkeypatch.setattr(lifecycle, "INLINE_ROWS", 10)
    monkeypatch.setattr(completion, "BATCH_ROWS", 12)
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=40, chunk=5)
        done, running, *_ = units_of(session, job)
        first = claim(session, done)
        lifecycle.succeed(session, first, outcomes=outcomes_of(session, first))
        claim(session, running)
    return job


def states(session: Session, job: Job) -> dict[str, int]:
    """The job's units by state."""
    counted = select(Unit.state, func.count()).where(Unit.job_id == job.id).group_by(Unit.state)
    return dict(tuple(row) for row in session.execute(counted))  # type: ignore[arg-type]


def test_request_only_marks_a_large_job_and_calls_the_leader(sessions: Sessions, large: Job) -> None:
    with listening(sessions.kw["bind"], UNITS_CHANNEL) as bell:
        with sessions.begin() as session:
            job = lifecycle.cancel(session, TENANT, large.id)
            assert (job.state, job.cancel_requested_at is not None) == ("running", True)
            assert states(session, large) == {"succeeded": 1, "running": 1, "queued": 6}
        assert CANCELLATION in bell.wait(5)
    with sessions.begin() as session:
        assert leases.claim(session, units_of(session, large)[2].id, "w", 45) is None, "it is claimed no more"


def test_leader_ends_it_in_batches_and_its_worker_ends_the_rest(sessions: Sessions, large: Job) -> None:
    with sessions.begin() as session:
        lifecycle.cancel(session, TENANT, large.id)
    cancelled = []
    for _ in range(4):
        with sessions.begin() as session:
            more = completion.cancel_batch(session)
            cancelled.append((more, session.get_one(Job, large.id).cancelled))
    assert cancelled == [(True, 15), (True, 30), (False, 30), (False, 30)], "whole units of at least 12 scans in all"
    with sessions.begin() as session:
        (running,) = session.scalars(select(Unit).where(Unit.state == UnitState.RUNNING))
        held = leases.Claim(running.id, large.id, TENANT, JobKind.PREDICT_BATCH, 1, running.fence or 0, "worker-a")
        lifecycle.confirm_cancel(session, held, outcomes_of(session, held)[:2])
        job = session.get_one(Job, large.id)
        session.refresh(job)
        assert (job.state, job.succeeded, job.cancelled) == ("cancelled", 7, 33)
        assert session.get_one(TenantLoad, TENANT).scans == 0
        assert faults(session, ended=True) == []
        terminal = select(func.count()).where(JobEvent.job_id == large.id, JobEvent.type == "cancelled")
        assert session.scalar(terminal) == 1


def test_worker_that_hands_back_a_unit_of_a_large_cancelled_job_ends_it(sessions: Sessions, large: Job) -> None:
    with sessions.begin() as session:
        lifecycle.cancel(session, TENANT, large.id)
        (running,) = session.scalars(select(Unit).where(Unit.state == UnitState.RUNNING))
        held = leases.Claim(running.id, large.id, TENANT, JobKind.PREDICT_BATCH, 1, running.fence or 0, "worker-a")
        lifecycle.fail(session, held, TRANSIENT)
        while completion.cancel_batch(session):
            pass
        assert faults(session, ended=True) == []


def test_locked_job_is_skipped(sessions: Sessions, large: Job) -> None:
    with sessions.begin() as session:
        lifecycle.cancel(session, TENANT, large.id)
    with sessions() as other, sessions.begin() as session:
        leases.lock_job(other, large.id)
        assert not completion.cancel_batch(session)


def test_explanations_of_a_cancelled_job_are_not_begun(sessions: Sessions, large: Job) -> None:
    """Its worker may end the chunk just after the cancellation."""
    with sessions.begin() as session:
        lifecycle.cancel(session, TENANT, large.id)
        (running,) = session.scalars(select(Unit).where(Unit.state == UnitState.RUNNING))
        held = leases.Claim(running.id, large.id, TENANT, JobKind.PREDICT_BATCH, 1, running.fence or 0, "worker-a")
        lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=True)
        assert len(units_of(session, large)) == 8
        pending = ScanResult.job_id == large.id, ScanResult.state == ResultState.PENDING
        assert session.scalar(select(func.count()).where(*pending)) == 30
