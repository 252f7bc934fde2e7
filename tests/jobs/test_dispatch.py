"""The dispatcher's queries and writes."""

from datetime import timedelta

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.queue import dispatch, leases, lifecycle, pace, processes
from jobs.queue.dispatch import QueueSnapshot
from jobs.queue.processes import Heartbeat
from jobs.states import JobKind, Lane
from jobs.tables import Unit
from tests.builders import claim, make_job, outcomes_of, units_of


def snapshot(session: Session, per_job: int = 4) -> QueueSnapshot:
    """The dispatcher's view with default intervals."""
    return dispatch.snapshot(session, redispatch_seconds=15, per_job=per_job, alive_seconds=15)


def dispatch_all(session: Session, per_job: int = 4) -> int:
    """Dispatch all waiting units and return their number."""
    return len(dispatch.dispatch(session, [unit.unit_id for unit in snapshot(session, per_job).waiting], 15))


def test_queued_unit_is_dispatched_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        (unit,) = snapshot(session).waiting
        assert (unit.unit_id, unit.lane, unit.kind) == (units_of(session, job)[0].id, "train", "train")
        assert dispatch_all(session) == 1
        assert list(snapshot(session).waiting) == []
        assert dispatch.dispatch(session, [unit.unit_id], 15) == set(), "not due again yet"


def test_unclaimed_unit_is_dispatched_again_with_doubling_waits(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session)
        dispatch_all(session)
        _age_dispatches(session, 16)
        (unit,) = snapshot(session).waiting
        assert unit.overdue
        assert dispatch_all(session) == 1
        _age_dispatches(session, 16)
        assert dispatch_all(session) == 0
        _age_dispatches(session, 16)
        assert dispatch_all(session) == 1


def test_few_units_of_one_job_are_dispatched_at_a_time(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=100, chunk=10)
        assert dispatch_all(session) == 4
        held = claim(session, units_of(session, job)[0])
        assert dispatch_all(session) == 1, "running units do not count: a job may have many workers"
        lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
        assert dispatch_all(session) == 0


def test_two_dispatchers_never_dispatch_the_same_unit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for _ in range(20):
            make_job(session)
        waiting = [unit.unit_id for unit in snapshot(session).waiting]
    with sessions.begin() as one, sessions.begin() as other:
        first = dispatch.dispatch(one, waiting[:12], 15)
        second = dispatch.dispatch(other, waiting, 15)
    assert first.isdisjoint(second)
    assert len(first | second) == 20


def test_snapshot_includes_every_tenant_behind_a_large_batch(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session, JobKind.PREDICT_BATCH, scans=300, chunk=1, tenant_id="large")
        for tenant in ("b", "c", "zz"):
            make_job(session, JobKind.PREDICT_BATCH, scans=1, tenant_id=tenant)
        make_job(session, JobKind.PREDICT, scans=1, tenant_id="b")
        seen = {(unit.lane, unit.tenant_id) for unit in snapshot(session).waiting}
    assert seen == {("batch", "large"), ("batch", "b"), ("batch", "c"), ("batch", "zz"), ("urgent", "b")}


def test_snapshot_includes_running_units_with_workers(sessions: Sessions) -> None:
    with sessions.begin() as session:
        batch = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        held = claim(session, units_of(session, batch)[0], "predict@here/41")
        processes.upsert(session, Heartbeat("predict@here/40", processes.WORKER, ["urgent", "batch"]))
        view = snapshot(session)
        (running,) = view.running
        assert (running.worker, running.can_yield, running.yield_requested) == ("predict@here", True, False)
        assert view.workers == [dispatch.Worker("predict@here", frozenset({Lane.URGENT, Lane.BATCH}))]
        dispatch.request_yield(session, [held.unit_id])
        assert leases.poll_status(session, held).yield_requested
        assert snapshot(session).running[0].yield_requested


def test_released_unit_waits_before_the_next_dispatch(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        dispatch_all(session)
        dispatch.release(session, [units_of(session, job)[0].id], delay=5)
        assert list(snapshot(session).waiting) == []
        session.execute(text("UPDATE units SET not_before = not_before - interval '6 seconds'"))
        assert dispatch_all(session) == 1


def test_lane_pace_is_measured_on_the_latest_units(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=30, chunk=10)
        for unit in units_of(session, job):
            held = claim(session, unit)
            session.execute(text("UPDATE units SET started_at = started_at - interval '2 s' WHERE state = 'running'"))
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
        measured = pace.mean_unit_seconds(session)
    assert measured == {Lane.BATCH: pytest.approx(2, abs=0.5)}


def test_dispatcher_queries_use_indexes(sessions: Sessions) -> None:
    """10,000 waiting jobs: each plan goes by an index."""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10, chunk=1)
        claim(session, units_of(session, job)[0])
        session.execute(text("CREATE TEMP TABLE wide AS SELECT uuidv7() AS id FROM generate_series(1, 10000)"))
        session.execute(
            text(
                "INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)"
                " SELECT id, 'other', 'predict', 'batch', 'queued', '{}', '{}', 1 FROM wide"
            )
        )
        session.execute(
            text(
                "INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, attempt, failures, rings)"
                " SELECT uuidv7(), 'other', id, 0, 'batch', 'queued', 0, 0, 0 FROM wide"
            )
        )
        session.execute(text("ANALYZE jobs, units"))
        snapshot(session)
        dispatch.reserve(session, [])
        dispatch.dispatch(session, [], 15)
        leases.claim_next(session, Lane.TRAIN, "w", 45)
        questions = [
            "EXECUTE snapshot (4, 15, 64, 15)",
            f"EXECUTE dispatch ('{{{job.id}}}', 15)",
            f"EXECUTE reserve ('{{{job.id}}}')",
            f"EXECUTE claim_unit ('{job.id}', 'w', 45)",
            "EXECUTE claim_next ('batch', 'w', 45)",
            pace.MEAN_UNIT_SECONDS.replace(":lanes", "'{batch,train,urgent}'"),
        ]
        for question in questions:
            plan = "\n".join(session.scalars(text("EXPLAIN " + question)))
            assert "Seq Scan on units" not in plan, plan
            assert "Seq Scan on jobs" not in plan, plan
            assert "snapshot" not in question or plan.count("pk_jobs") == 1, (
                f"but for the jobs of running units: {plan}"
            )


def test_reserved_unit_is_claimed_once_by_claim_next(sessions: Sessions) -> None:
    with sessions.begin() as session:
        first, second = make_job(session), make_job(session)
        waiting = [unit.unit_id for unit in snapshot(session).waiting]
        dispatch.reserve(session, waiting)
        assert [unit.reserved for unit in snapshot(session).waiting] == [True, True]
        taken = [leases.claim_next(session, Lane.TRAIN, "w", 45) for _ in range(3)]
        assert [held and held.job_id for held in taken] == [first.id, second.id, None]
        assert leases.claim_next(session, Lane.BATCH, "w", 45) is None


def test_reserved_unit_can_be_dispatched_and_is_then_not_reserved(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session)
        (unit,) = snapshot(session).waiting
        dispatch.reserve(session, [unit.unit_id])
        assert dispatch.dispatch(session, [unit.unit_id], 15) == {unit.unit_id}
        assert leases.claim_next(session, Lane.TRAIN, "w", 45) is None


def _age_dispatches(session: Session, seconds: int) -> None:
    session.execute(update(Unit).values(dispatched_at=Unit.dispatched_at - timedelta(seconds=seconds)))
