"""The life of a job, verb by verb, on real Postgres."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement, Sessions, listening
from jobs.errors import JobNotFound, LeaseLost, WrongState
from jobs.events import job_events
from jobs.queue import leases, lifecycle
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


def test_a_submitted_job_waits_with_one_unit_and_one_event(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        assert (job.state, job.total, job.attempt) == ("queued", 1, 0)
        assert [unit.state for unit in units_of(session, job)] == ["queued"]
        assert _events(session, job) == ["submitted"]


def test_a_batch_is_cut_into_chunks_in_order(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=25, chunk=10)
        assert [unit.ordinal for unit in units_of(session, job)] == [0, 1, 2]
        sizes = session.execute(text("SELECT count(*) FROM scan_results GROUP BY unit_id ORDER BY 1")).scalars().all()
        assert sizes == [5, 10, 10]


def test_a_batch_of_broken_scans_alone_has_failed_before_it_began(sessions: Sessions) -> None:
    with sessions.begin() as session:
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
        job = submit(session, new, [NewResult(None, name="a.txt", error=BROKEN)] * 3)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "ALL_SCANS_FAILED"
        assert not faults(session)


def test_of_fifty_workers_one_gets_the_unit(sessions: Sessions) -> None:
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


def test_a_claim_starts_the_job_and_raises_its_attempt(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        session.refresh(job)
        assert (job.state, job.attempt, held.attempt) == ("running", 1, 1)
        assert job.started_at is not None


def test_a_unit_that_is_not_due_is_refused(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        lifecycle.fail(session, claim(session, units_of(session, job)[0]), TRANSIENT, RetryPolicy(base=60))
        (unit,) = units_of(session, job)
        wait = unit.not_before - session.scalar(select(lifecycle.NOW))
        assert timedelta(0) < wait < timedelta(seconds=60), "evenly between nothing and the bound"
        assert leases.claim(session, unit.id, "w", 45) is None


def test_a_beat_renews_the_lease_and_a_look_hears_of_a_cancel(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        assert leases.beat(session, held, 45)
        assert leases.poll_status(session, held) == leases.UnitStatus(held=True)
        lifecycle.cancel(session, TENANT, job.id)
        assert leases.beat(session, held, 45)
        assert leases.poll_status(session, held) == leases.UnitStatus(held=True, cancel_requested=True)


def test_a_worker_thought_dead_can_write_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        stale = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
        assert lifecycle.reap(session, retry=RetryPolicy(), stall=900) == 1
        fresh = claim(session, units_of(session, job)[0], "worker-b")
        assert fresh.fence > stale.fence
        assert not leases.beat(session, stale, 45)
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


def test_a_fence_that_a_crash_gave_out_twice_serves_one_worker_only(sessions: Sessions) -> None:
    """A claim does not wait for the disk: after a crash Postgres may have forgotten it, and its number with it."""
    with sessions.begin() as session:
        job = make_job(session)
        forgotten = claim(session, units_of(session, job)[0], "worker-a")
        lifecycle.requeue(session, forgotten, "FORGOTTEN")
        fence = text("SELECT setval('unit_fence_seq', :fence, false)")
        session.execute(fence, {"fence": forgotten.fence})
        fresh = claim(session, units_of(session, job)[0], "worker-b")
        assert fresh.fence == forgotten.fence
        assert not leases.beat(session, forgotten, 45)
        with pytest.raises(LeaseLost):
            lifecycle.succeed(session, forgotten)
        lifecycle.succeed(session, fresh)


def test_the_fence_is_what_refuses_the_stale_worker(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: without the fence in the guard, the stale worker's write goes through."""
    unfenced = lifecycle.SUCCEED.sql.replace("AND fence = $3 AND worker = $4", "")
    assert unfenced != lifecycle.SUCCEED.sql
    types = "uuid, uuid, bigint, text, int, int, float8, jsonb, varchar[]"
    monkeypatch.setattr(lifecycle, "SUCCEED", PreparedStatement("succeed_unfenced", types, unfenced))
    with sessions.begin() as session:
        job = make_job(session)
        stale = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
        lifecycle.reap(session, retry=RetryPolicy(), stall=900)
        claim(session, units_of(session, job)[0], "worker-b")
        lifecycle.succeed(session, stale)
        session.refresh(job)
        assert job.state == "succeeded", "the guard that the test before relies on was removed"


def test_the_reaper_leaves_a_unit_that_beat_in_between(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        _let_the_lease_run_out(session)
    candidate, beaten, done = threading.Event(), threading.Event(), []
    real_lock = lifecycle.lock_job

    def pausing_lock(session: Session, job_id: object) -> None:
        candidate.set()
        beaten.wait(10)
        real_lock(session, job_id)  # type: ignore[arg-type]

    def reap() -> None:
        with pytest.MonkeyPatch.context() as patch, sessions.begin() as session:
            patch.setattr(lifecycle, "lock_job", pausing_lock)
            done.append(lifecycle.reap(session, retry=RetryPolicy(), stall=900))

    thread = threading.Thread(target=reap)
    thread.start()
    candidate.wait(10)
    with sessions.begin() as session:
        assert leases.beat(session, held, 45)
    beaten.set()
    thread.join(10)
    assert done == [0], "the expiry is checked again in the UPDATE"


def test_the_reaper_does_not_wait_for_who_is_frozen_in_a_transaction(sessions: Sessions) -> None:
    with sessions.begin() as session:
        held = claim(session, units_of(session, make_job(session))[0])
        _let_the_lease_run_out(session)
    with sessions() as frozen:
        frozen.execute(update(Unit).where(Unit.id == held.unit_id).values(worker=held.worker))
        started = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"), sessions.begin() as session:
            lifecycle.reap(session, retry=RetryPolicy(), stall=900)
        assert time.monotonic() - started < 5
    with sessions.begin() as session:
        assert lifecycle.reap(session, retry=RetryPolicy(), stall=900) == 1


def test_a_lost_unit_fails_for_good_at_the_third_loss(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        for _ in range(3):
            claim(session, units_of(session, job)[0])
            _let_the_lease_run_out(session)
            lifecycle.reap(session, retry=RetryPolicy(), stall=900)
        session.refresh(job)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "WORKER_LOST"
        assert job.attempt == 3
        assert not faults(session)


def test_a_beating_unit_without_progress_is_stalled(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        claim(session, units_of(session, job)[0])
        session.execute(text("UPDATE units SET progress_at = progress_at - interval '1000 seconds'"))
        assert lifecycle.reap(session, retry=RetryPolicy(1), stall=900) == 1
        session.refresh(job)
        assert job.error is not None
        assert job.error["code"] == "STALLED"


def test_a_drained_unit_goes_back_without_a_failure(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        lifecycle.requeue(session, claim(session, units_of(session, job)[0]), "DRAINED")
        (unit,) = units_of(session, job)
        assert (unit.state, unit.failures, unit.attempt) == ("queued", 0, 1)


def test_what_was_done_before_a_drain_is_kept(sessions: Sessions) -> None:
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


def test_a_cancel_keeps_what_was_done(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10)
        held = claim(session, units_of(session, job)[0])
        lifecycle.cancel(session, TENANT, job.id)
        lifecycle.confirm_cancel(session, held, outcomes_of(session, held)[:4])
        session.refresh(job)
        assert (job.state, job.succeeded, job.cancelled) == ("cancelled", 4, 6)
        assert not faults(session)


@pytest.mark.parametrize("hand_back", ["drain", "failure"])
def test_a_unit_handed_back_after_a_cancel_ends(sessions: Sessions, hand_back: str) -> None:
    """Nobody could claim it any more: it would wait for ever."""
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


def test_a_chunk_that_lost_its_worker_twice_is_split_until_the_poison_is_alone(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=100, chunk=100)
        deaths = 0
        while waiting := [unit for unit in units_of(session, job) if unit.finished_at is None]:
            held = claim(session, waiting[0])
            outcomes = outcomes_of(session, held)
            if 70 in [outcome.ordinal for outcome in outcomes]:
                _let_the_lease_run_out(session)
                assert lifecycle.reap(session, retry=RetryPolicy(), stall=900) == 1
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


def test_an_error_that_is_no_scans_fault_splits_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=100, chunk=100)
        for _ in range(2):
            lifecycle.fail(session, claim(session, units_of(session, job)[0]), TRANSIENT)
        assert len(units_of(session, job)) == 1


def test_a_permanent_failure_ends_the_job_at_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.FAILED)
        assert (job.state, job.failed, job.error) == ("failed", 1, BROKEN)
        assert not faults(session)


def test_a_batch_with_some_failures_has_partially_succeeded(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        for unit in units_of(session, job):
            held = claim(session, unit)
            lifecycle.succeed(session, held, outcomes=outcomes_of(session, held, failed=1))
        session.refresh(job)
        assert (job.state, job.succeeded, job.failed) == ("partially_succeeded", 18, 2)
        assert not faults(session)


def test_two_last_chunks_that_end_together_end_the_job_once(sessions: Sessions) -> None:
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
        assert lifecycle.cancel(session, TENANT, job.id).state == "cancelled", "repeated: the same"
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


def test_nobody_cancels_a_job_of_another_tenant(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        for tenant, job_id in (("other", job.id), (TENANT, unknown_id())):
            with pytest.raises(JobNotFound):
                lifecycle.cancel(session, tenant, job_id)


def test_a_cancelled_unit_is_refused_and_a_dead_worker_does_not_hold_the_cancel_up(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        claim(session, units_of(session, job)[0])
        lifecycle.cancel(session, TENANT, job.id)
        _let_the_lease_run_out(session)
        lifecycle.reap(session, retry=RetryPolicy(), stall=900)
        session.refresh(job)
        assert job.state == "cancelled"
        assert leases.claim(session, units_of(session, job)[0].id, "w", 45) is None
        assert not faults(session)


def test_cancel_and_success_at_once_have_one_winner(sessions: Sessions) -> None:
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


def test_every_illegal_move_of_a_unit_is_refused_by_the_database(sessions: Sessions) -> None:
    """Also shows that the trigger and `jobs/states.py` name the same moves."""
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


def test_an_ended_job_stays_as_it_ended(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.SUCCEEDED)
    with pytest.raises(IntegrityError, match="has ended"), sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job.id).values(state="running", finished_at=None))


def test_a_scan_that_has_ended_stays_as_it_ended(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=3)
    with pytest.raises(IntegrityError, match="has ended as succeeded"), sessions.begin() as session:
        session.execute(update(ScanResult).where(ScanResult.job_id == job.id).values(label="Normal"))


def test_events_only_grow_and_the_end_comes_once(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, state=JobState.SUCCEEDED)
    with pytest.raises(IntegrityError, match="append-only"), sessions.begin() as session:
        session.execute(update(JobEvent).values(type="other"))
    for state in TERMINAL:
        with pytest.raises(IntegrityError, match="uq_job_events_terminal"), sessions.begin() as session:
            job_events.record(session, job.id, TENANT, state, {})


def test_a_running_unit_without_a_lease_is_refused(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session)
    with pytest.raises(IntegrityError, match="running_is_leased"), sessions.begin() as session:
        session.execute(update(Unit).values(state="running"))


def test_every_change_of_a_job_is_told_and_gives_it_a_new_revision(sessions: Sessions) -> None:
    with listening(sessions.kw["bind"], job_events.JOBS_CHANNEL, job_events.UNITS_CHANNEL) as bell:
        with sessions.begin() as session:
            job = make_job(session)
            before = job.revision
        assert str(job.id) in bell.wait(5)
        with sessions.begin() as session:
            claim(session, units_of(session, job)[0])
        assert bell.wait(5) == [str(job.id)]
        with sessions() as session:
            assert session.get_one(Job, job.id).revision > before


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


def test_a_scan_can_be_in_a_batch_twice(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scan = make_scan(session)
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
        assert submit(session, new, [NewResult(scan.id)] * 2).total == 2
