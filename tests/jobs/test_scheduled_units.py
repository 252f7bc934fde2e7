"""Units that wait for a time: out of the way of dispatching and claims until they are due."""

from datetime import timedelta

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions
from jobs.queue import leases, lifecycle
from jobs.queue.lifecycle import RetryPolicy
from jobs.states import JobKind, UnitState
from jobs.tables import Job, Unit
from tests.builders import BROKEN, TENANT, TRANSIENT, claim, make_job, units_of
from tests.jobs.checker import faults

LATER = RetryPolicy(base=60)


def make_due(session: Session) -> None:
    """The time of all scheduled units has come."""
    past = "UPDATE units SET not_before = now() - interval '1 s' WHERE state = 'scheduled'"
    session.execute(text(past))


def failed(session: Session, job: Job) -> Unit:
    """Its unit, after a first failure."""
    assert lifecycle.fail(session, claim(session, units_of(session, job)[0]), TRANSIENT, LATER) == UnitState.SCHEDULED
    return units_of(session, job)[0]


def test_failed_unit_waits_outside_the_queue(sessions: Sessions) -> None:
    with sessions.begin() as session:
        unit = failed(session, make_job(session))
        wait = unit.not_before - session.scalars(select(NOW)).one()
        assert timedelta(0) < wait < timedelta(seconds=60), "uniform between 0 and the bound"
        assert leases.claim(session, unit.id, "w", 45) is None
        assert lifecycle.enqueue_due(session) == []
        assert not faults(session)


def test_due_units_are_queued_in_batches(sessions: Sessions) -> None:
    with sessions.begin() as session:
        unit_ids = [failed(session, make_job(session)).id for _ in range(3)]
        make_due(session)
        assert [len(lifecycle.enqueue_due(session, limit=2)) for _ in range(3)] == [2, 1, 0]
        for unit_id in unit_ids:
            assert leases.claim(session, unit_id, "w", 45) is not None


def test_units_that_others_hold_are_left_for_the_next_time(sessions: Sessions) -> None:
    with sessions.begin() as session:
        held, free = (failed(session, make_job(session)).id for _ in range(2))
        make_due(session)
    with sessions() as other, sessions.begin() as session:
        other.execute(select(Unit.id).where(Unit.id == held).with_for_update())
        assert len(lifecycle.enqueue_due(session)) == 1
        assert session.get_one(Unit, free).state == UnitState.QUEUED


def test_cancelling_ends_a_scheduled_unit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        failed(session, job)
        assert lifecycle.cancel(session, TENANT, job.id).state == "cancelled"
        assert not faults(session)


def test_only_what_is_due_is_read(sessions: Sessions) -> None:
    """However many wait for a time, none of them is read before it is due."""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=1)
        more = """
            INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, not_before)
            SELECT gen_random_uuid(), tenant_id, job_id, n, lane, 'scheduled', now() + (n - 5) * interval '1 s'
            FROM units, generate_series(1, 10000) AS n WHERE job_id = :job"""
        session.execute(text(more), {"job": job.id})
        session.execute(text("ANALYZE units"))
        plan = str(session.execute(text(f"EXPLAIN (ANALYZE) {lifecycle.ENQUEUE_DUE.sql.replace('$1', '1000')}")).all())
        assert "ix_units_scheduled" in plan
        assert "Seq Scan on units" not in plan


def test_final_failure_needs_no_wait(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        assert lifecycle.fail(session, claim(session, units_of(session, job)[0]), BROKEN, LATER) == UnitState.FAILED
        session.refresh(job)
        assert (job.state, job.error) == ("failed", BROKEN)
