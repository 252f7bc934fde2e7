"""Transitions of jobs and units, on real Postgres."""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement, Sessions
from jobs.errors import JobNotFound, LeaseLost, WrongState
from jobs.events import job_events
from jobs.queue import dispatch, leases, lifecycle, reaping
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import TERMINAL, TRANSITIONS, JobKind, JobState, Lane, UnitState
from jobs.tables import Job, JobEvent, ScanResult, Unit
from tests.builders import (
    BROKEN,
    TENANT,
    TRANSIENT,
    claim,
    make_job,
    make_scan,
    outcomes_of,
    units_of,
    unknown_id,
)
from tests.jobs.checker import faults


def test_submitted_job_is_queued_with_one_unit_and_one_event(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        assert (job.state, job.total, job.attempt) == ("queued", 1, 0)
        assert [unit.state for unit in units_of(session, job)] == ["queued"]
        assert _events(session, job) == ["submitted"]


def test_batch_is_split_into_chunks_in_order(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=25, chunk=10)
        assert [unit.ordinal for unit in units_of(session, job)] == [0, 1, 2]
        sizes = session.execute(text("SELECT count(*) FROM scan_results GROUP BY unit_id ORDER BY 1")).scalars().all()
        assert sizes == [5, 10, 10]


def test_batch_of_broken_scans_only_fails_at_submission(sessions: Sessions) -> None:
    with sessions.begin() as session:
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
        job = submit(session, new, [NewResult(None, name="a.txt", error=BROKEN)] * 3)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "ALL_SCANS_FAILED"
        assert not faults(session)


def test_one_of_fifty_workers_claims_the_unit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        unit = units_of(session, make_job(session))[0]
    start = threading.Barrier(20)

    def try_once(number: int) -> bool:
        start.wait()
        for _ in range(3):
            with sessions.begin() as session:
                if leases.claim(session, unit.id, f"worker-{number}", 45):
                    return True
        return False

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(try_once, range(20))) == 1


def test_claim_starts_the_job_and_increments_the_attempt(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        session.refresh(job)
        assert (job.state, job.attempt, held.attempt) == ("running", 1, 1)
        assert job.started_at is not None


def test_claims_at_the_same_time_start_their_job_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=8, chunk=1)
        units = [unit.id for unit in units_of(session, job)]
    start = threading.Barrier(len(units))

    def claim_one(unit: uuid.UUID) -> bool:
        start.wait()
        with sessions.begin() as session:
            return leases.claim(session, unit, "worker", 45) is not None

    with ThreadPoolExecutor(len(units)) as pool:
        assert all(pool.map(claim_one, units))
    with sessions() as session:
        assert _events(session, session.get_one(Job, job.id)) == ["submitted", "claimed"]


def test_further_claims_do_not_wait_for_their_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=1)
        first, second, third = units_of(session, job)
        claim(session, first)
        dispatch.reserve(session, [third.id])
    with sessions() as ending, sessions.begin() as session:
        leases.lock_job(ending, job.id)
        session.execute(text("SET LOCAL lock_timeout = '1s'"))
        claim(session, second)
        held = leases.claim_next(session, Lane.BATCH, "worker", 45)
    assert held is not None
    assert held.unit_id == third.id


def test_reserved_units_are_claimed_at_the_same_time(sessions: Sessions) -> None:
    with sessions.begin() as session:
        units = units_of(session, make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=1))
        claim(session, units[0])
        dispatch.reserve(session, [unit.id for unit in units[1:]])
    with sessions() as first, sessions() as second:
        held = [leases.claim_next(session, Lane.BATCH, "worker", 45) for session in (first, second)]
    assert [one and one.ordinal for one in held] == [1, 2]


def test_a_unit_that_an_older_release_made_has_the_kind_of_its_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        unit = units_of(session, make_job(session, JobKind.PREDICT_BATCH, scans=1))[0]
        session.execute(update(Unit).values(kind=None))
        read = dispatch.QueueReader().read(session, redispatch_seconds=15, alive_seconds=15)
        assert [waiting.kind for waiting in read.waiting] == [JobKind.PREDICT_BATCH]
        assert claim(session, unit).kind == JobKind.PREDICT_BATCH


def test_beat_renews_the_lease_and_poll_status_reports_a_cancel(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        assert leases.beat(session, held, 45).held
        assert leases.poll_status(session, held) == leases.UnitStatus(held=True)
        lifecycle.cancel(session, TENANT, job.id)
        assert leases.beat(session, held, 45).held
        assert leases.poll_status(session, held) == leases.UnitStatus(held=True, cancel_requested=True)


def test_worker_with_a_stale_fence_writes_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        stale = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
        assert reaping.reap(session, retry=RetryPolicy(), stall=900) == 1
        fresh = claim(session, units_of(session, job)[0], "worker-b")
        assert fresh.fence > stale.fence
        assert not leases.beat(session, stale, 45).held
        assert not leases.poll_status(session, stale).held
        for write in (
            lambda: lifecycle.report(session, stale, progress=0.5),
            lambda: lifecycle.succeed(session, stale),
            lambda: lifecycle.fail(session, stale, BROKEN),
            lambda: lifecycle.requeue(session, stale, "DRAINED"),
            lambda: lifecycle.confirm_cancel(session, stale),
        ):
            with pytest.raises(LeaseLost):
                write()
        lifecycle.succeed(session, fresh, metrics={"f1": 0.9})
        session.refresh(job)
        assert (job.state, job.attempt, job.metrics) == ("succeeded", 2, {"f1": 0.9})
        assert not faults(session)


def test_fence_given_out_twice_after_a_crash_serves_one_worker(sessions: Sessions) -> None:
    """A claim does not wait for the disk: a crash of Postgres may lose it together with its fence."""
    with sessions.begin() as session:
        job = make_job(session)
        forgotten = claim(session, units_of(session, job)[0], "worker-a")
        lifecycle.requeue(session, forgotten, "FORGOTTEN")
        fence = text("SELECT setval('unit_fence_seq', :fence, false)")
        session.execute(fence, {"fence": forgotten.fence})
        fresh = claim(session, units_of(session, job)[0], "worker-b")
        assert fresh.fence == forgotten.fence
        assert not leases.beat(session, forgotten, 45).held
        with pytest.raises(LeaseLost):
            lifecycle.succeed(session, forgotten)
        lifecycle.succeed(session, fresh)


def test_without_the_fence_the_stale_worker_would_write(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation test: without the fence in the guard, the stale worker's write succeeds."""
    unfenced = lifecycle.SUCCEED.sql.replace("AND fence = $3 AND worker = $4", "")
    assert unfenced != lifecycle.SUCCEED.sql
    types = "uuid, uuid, bigint, text, int, int, float8, jsonb, varchar[]"
    monkeypatch.setattr(lifecycle, "SUCCEED", PreparedStatement("succeed_unfenced", types, unfenced))
    with sessions.begin() as session:
        job = make_job(session)
        stale = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
        reaping.reap(session, retry=RetryPolicy(), stall=900)
        claim(session, units_of(session, job)[0], "worker-b")
        lifecycle.succeed(session, stale)
        session.refresh(job)
        assert job.state == "succeeded", "the guard that the test before relies on was removed"


def test_reaper_leaves_a_unit_that_beats_in_between(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
    candidate, beaten, done = threading.Event(), threading.Event(), []
    real_lock = reaping.lock_job

    def pausing_lock(session: Session, job_id: object) -> None:
        candidate.set()
        beaten.wait(10)
        real_lock(session, job_id)  # type: ignore[arg-type]

    def reap() -> None:
        with pytest.MonkeyPatch.context() as patch, sessions.begin() as session:
            patch.setattr(reaping, "lock_job", pausing_lock)
            done.append(reaping.reap(session, retry=RetryPolicy(), stall=900))

    thread = threading.Thread(target=reap)
    thread.start()
    candidate.wait(10)
    with sessions.begin() as session:
        assert leases.beat(session, held, 45).held
    beaten.set()
    thread.join(10)
    assert done == [0], "the expiry is checked again in the UPDATE"


def test_reaper_does_not_wait_for_a_frozen_transaction(sessions: Sessions) -> None:
    with sessions.begin() as session:
        held = claim(session, units_of(session, make_job(session))[0])
        _let_the_lease_run_out(session)
    with sessions() as frozen:
        frozen.execute(update(Unit).where(Unit.id == held.unit_id).values(worker=held.worker))
        started = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"), sessions.begin() as session:
            reaping.reap(session, retry=RetryPolicy(), stall=900)
        assert time.monotonic() - started < 5
    with sessions.begin() as session:
        assert reaping.reap(session, retry=RetryPolicy(), stall=900) == 1


def test_unit_fails_for_good_at_the_third_loss(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        for _ in range(3):
            claim(session, units_of(session, job)[0])
            _let_the_lease_run_out(session)
            reaping.reap(session, retry=RetryPolicy(), stall=900)
        session.refresh(job)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "WORKER_LOST"
        assert job.attempt == 3
        assert not faults(session)


def test_beating_unit_without_progress_is_stalled(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        claim(session, units_of(session, job)[0])
        session.execute(text("UPDATE units SET progress_at = progress_at - interval '1000 seconds'"))
        assert reaping.reap(session, retry=RetryPolicy(1), stall=900) == 1
        session.refresh(job)
        assert job.error is not None
        assert job.error["code"] == "STALLED"


def test_drained_unit_is_requeued_without_a_failure(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        lifecycle.requeue(session, claim(session, units_of(session, job)[0]), "DRAINED")
        (unit,) = units_of(session, job)
        assert (unit.state, unit.failures, unit.attempt) == ("queued", 0, 1)


def test_drain_keeps_finished_scans(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10)
        first = claim(session, units_of(session, job)[0])
        lifecycle.requeue(session, first, "DRAINED", outcomes_of(session, first, engine="openvino-int8")[:4])
        (unit,) = units_of(session, job)
        assert (unit.state, unit.scans) == ("queued", 6)
        second = claim(session, unit)
        lifecycle.succeed(session, second, outcomes=outcomes_of(session, second, engine="openvino-bf16")[4:])
        session.refresh(job)
        assert (job.state, job.succeeded) == ("succeeded", 10)
        assert sorted(job.engines) == ["openvino-bf16", "openvino-int8"]
        assert not faults(session)


def test_cancel_keeps_finished_scans(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10)
        held = claim(session, units_of(session, job)[0])
        lifecycle.cancel(session, TENANT, job.id)
        lifecycle.confirm_cancel(session, held, outcomes_of(session, held)[:4])
        session.refresh(job)
        assert (job.state, job.succeeded, job.cancelled) == ("cancelled", 4, 6)
        assert not faults(session)


@pytest.mark.parametrize("hand_back", ["drain", "failure"])
def test_requeue_after_a_cancel_ends_the_unit(sessions: Sessions, hand_back: str) -> None:
    """It could not be claimed any more, and would stay queued for ever."""
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10)
        held = claim(session, units_of(session, job)[0])
        lifecycle.cancel(session, TENANT, job.id)
        if hand_back == "drain":
            lifecycle.requeue(session, held, "DRAINED")
        else:
            lifecycle.fail(session, held, TRANSIENT)
        session.refresh(job)
        assert (job.state, job.cancelled) == ("cancelled", 10)
        assert not faults(session)


def test_chunk_that_lost_two_workers_is_split_until_the_poison_scan_is_alone(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=100, chunk=100)
        deaths = 0
        while waiting := [unit for unit in units_of(session, job) if unit.finished_at is None]:
            held = claim(session, waiting[0])
            outcomes = outcomes_of(session, held)
            if 70 in [outcome.ordinal for outcome in outcomes]:
                _let_the_lease_run_out(session)
                assert reaping.reap(session, retry=RetryPolicy(), stall=900) == 1
                deaths += 1
            else:
                lifecycle.succeed(session, held, outcomes=outcomes)
        session.refresh(job)
        assert (job.state, job.succeeded, job.failed) == ("partially_succeeded", 99, 1)
        poison = session.get_one(ScanResult, (job.id, 70))
        assert poison.error is not None
        assert poison.error["code"] == "WORKER_LOST"
        assert deaths == 6, "twice as a chunk, once as an eighth of it, once in two scans, then alone until the third"
        assert not faults(session)


def test_infrastructure_errors_split_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=100, chunk=100)
        for _ in range(2):
            lifecycle.fail(session, claim(session, units_of(session, job)[0]), TRANSIENT)
        assert len(units_of(session, job)) == 1


def test_permanent_failure_ends_the_job_at_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.FAILED)
        assert (job.state, job.failed, job.error) == ("failed", 1, BROKEN)
        assert not faults(session)


def test_batch_with_some_failures_partially_succeeds(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        for unit in units_of(session, job):
            held = claim(session, unit)
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held, failed=1))
        session.refresh(job)
        assert (job.state, job.succeeded, job.failed) == ("partially_succeeded", 18, 2)
        assert not faults(session)


def test_last_two_chunks_ending_together_finish_the_job_once(sessions: Sessions) -> None:
    for _ in range(10):
        with sessions.begin() as session:
            job = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
            held = [claim(session, unit) for unit in units_of(session, job)]

        def end(one: leases.Claim) -> None:
            with sessions.begin() as session:
                lifecycle.succeed(session, one, outcomes=outcomes_of(session, one))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(end, held))
        with sessions.begin() as session:
            assert session.get_one(Job, job.id).state == "succeeded"
            assert not faults(session)


def test_cancelling_a_queued_job_ends_it_now(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20)
        job = lifecycle.cancel(session, TENANT, job.id)
        assert (job.state, job.cancelled) == ("cancelled", 20)
        assert lifecycle.cancel(session, TENANT, job.id).state == "cancelled", "idempotent"
        assert not faults(session)


def test_cancelling_a_running_job_waits_for_its_worker(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20)
        done, running = (claim(session, unit) for unit in units_of(session, job))
        lifecycle.succeed(session, done, outcomes=outcomes_of(session, done))
        assert lifecycle.cancel(session, TENANT, job.id).state == "running"
        lifecycle.confirm_cancel(session, running)
        session.refresh(job)
        assert (job.state, job.succeeded, job.cancelled) == ("cancelled", 10, 10)
        assert not faults(session)


def test_a_job_cannot_be_cancelled_after_its_end(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.SUCCEEDED)
        with pytest.raises(WrongState, match="succeeded"):
            lifecycle.cancel(session, TENANT, job.id)


def test_job_of_another_tenant_cannot_be_cancelled(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        for tenant, job_id in (("other", job.id), (TENANT, unknown_id())):
            with pytest.raises(JobNotFound):
                lifecycle.cancel(session, tenant, job_id)


def test_cancelled_unit_is_not_claimed_and_a_dead_worker_does_not_delay_the_cancel(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        claim(session, units_of(session, job)[0])
        lifecycle.cancel(session, TENANT, job.id)
        _let_the_lease_run_out(session)
        reaping.reap(session, retry=RetryPolicy(), stall=900)
        session.refresh(job)
        assert job.state == "cancelled"
        assert leases.claim(session, units_of(session, job)[0].id, "w", 45) is None
        assert not faults(session)


def test_concurrent_cancel_and_success_have_one_winner(sessions: Sessions) -> None:
    for _ in range(10):
        with sessions.begin() as session:
            job = make_job(session)
            held = claim(session, units_of(session, job)[0])

        def finish(held: leases.Claim = held) -> None:
            with sessions.begin() as session:
                lifecycle.succeed(session, held)

        def cancel(job: Job = job) -> None:
            with sessions.begin() as session:
                lifecycle.cancel(session, TENANT, job.id)

        with ThreadPoolExecutor(2) as pool:
            results = [pool.submit(finish), pool.submit(cancel)]
            assert results[0].exception() is None
        with sessions.begin() as session:
            assert session.get_one(Job, job.id).state == "succeeded"
            assert not faults(session)


# --- what the database itself forbids ---


def test_database_refuses_every_illegal_unit_transition(sessions: Sessions) -> None:
    """The trigger and `jobs/states.py` allow the same transitions."""
    with sessions.begin() as session:
        unit = units_of(session, make_job(session))[0]
    for start in UnitState:
        for end in UnitState:
            if start == end or end in TRANSITIONS[start]:
                continue
            with sessions() as session:
                session.execute(text("ALTER TABLE units DISABLE TRIGGER USER"))
                session.execute(update(Unit).where(Unit.id == unit.id).values(**_unit_in(start)))
                session.execute(text("ALTER TABLE units ENABLE TRIGGER USER"))
                with pytest.raises(IntegrityError):
                    session.execute(update(Unit).where(Unit.id == unit.id).values(**_unit_in(end)))


def test_database_refuses_changes_of_an_ended_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.SUCCEEDED)
    with pytest.raises(IntegrityError, match="has ended"), sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(state="running", finished_at=None))


def test_database_refuses_changes_of_an_ended_result(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=3)
    with pytest.raises(IntegrityError, match="has ended as succeeded"), sessions.begin() as session:
        session.execute(update(ScanResult).where(ScanResult.job_id == job.id).values(label="Normal"))


def test_events_are_append_only_with_one_terminal_event(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.SUCCEEDED)
    with pytest.raises(IntegrityError, match="append-only"), sessions.begin() as session:
        session.execute(update(JobEvent).values(type="other"))
    for state in TERMINAL:
        with pytest.raises(IntegrityError, match="uq_job_events_terminal"), sessions.begin() as session:
            job_events.record(session, job.id, TENANT, state, {})


def test_database_refuses_a_running_unit_without_lease(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session)
    with pytest.raises(IntegrityError, match="running_is_leased"), sessions.begin() as session:
        session.execute(update(Unit).values(state="running"))


def _unit_in(state: UnitState) -> dict[str, object]:
    now = lifecycle.NOW
    ended = state in (UnitState.SUCCEEDED, UnitState.FAILED, UnitState.CANCELLED)
    return {
        "state": state,
        "finished_at": now if ended else None,
        "lease_expires_at": now if state == UnitState.RUNNING else None,
    }


def _let_the_lease_run_out(session: Session) -> None:
    session.execute(
        text("UPDATE units SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE state='running'")
    )


def _events(session: Session, job: Job) -> list[str]:
    return list(session.scalars(select(JobEvent.type).where(JobEvent.job_id == job.id).order_by(JobEvent.id)))


def test_batch_may_contain_a_scan_twice(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scan = make_scan(session)
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
        assert submit(session, new, [NewResult(scan.id)] * 2).total == 2
