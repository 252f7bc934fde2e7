"""The dispatcher's queries and writes."""

from datetime import timedelta
from statistics import median

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from jobs.db import NOW, Sessions, listening
from jobs.events.job_events import UNITS_CHANNEL, place
from jobs.queue import dispatch, leases, lifecycle, pace, processes
from jobs.queue.dispatch import QueueReader, QueueSnapshot, WaitingUnit
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.processes import Heartbeat
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.tables import Unit, new_id
from tests.builders import claim, make_job, outcomes_of, units_of
from tests.plans import pages_read
from worker.dispatcher.leadership import planning_connection
from worker.dispatcher.scheduler import FairScheduler

RETRYABLE = {"code": "INTERNAL", "detail": "", "retryable": True}


def snapshot(session: Session, per_tenant: int = 64) -> QueueSnapshot:
    """The dispatcher's view with default intervals."""
    return QueueReader().read(session, redispatch_seconds=15, alive_seconds=15, per_tenant=per_tenant)


def dispatch_all(session: Session) -> int:
    """Dispatch all waiting units and return their number."""
    return len(dispatch.dispatch(session, [unit.unit_id for unit in snapshot(session).waiting], 15))


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


def test_one_batch_may_fill_all_workers_in_one_look(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=1000, chunk=10)
        for number in range(50):
            processes.upsert(session, Heartbeat(f"w{number}@here/a1", processes.WORKER, ["batch"]))
        assert len(snapshot(session, per_tenant=8).waiting) == 58
        claim(session, units_of(session, job)[0], "w7@here/a1/41")
        assert len(snapshot(session, per_tenant=8).waiting) == 57, "with all workers busy a few of each tenant suffice"


def test_a_look_reads_no_more_than_a_share_of_the_idle_workers_for_each_tenant(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for number in range(20):
            processes.upsert(session, Heartbeat(f"w{number}@here/a1", processes.WORKER, ["batch"]))
            make_job(session, JobKind.PREDICT_BATCH, scans=30 if number < 5 else 1, chunk=1, tenant_id=f"t{number:02}")
        found = snapshot(session, per_tenant=4)
        assert len(found.waiting) == 5 * (4 + 1) + 15
        assert found.cut_off == {(Lane.BATCH, f"t{number:02}") for number in range(5)}
        plan = FairScheduler(1, 0, 5).plan(found, {})
        assert (len(plan.dispatch), plan.read_more) == (20, False)


def test_two_looks_find_work_for_all_idle_workers_when_one_tenant_has_nearly_all_units(sessions: Sessions) -> None:
    scheduler = FairScheduler(1, 0, 5)
    with sessions.begin() as session:
        for number in range(40):
            processes.upsert(session, Heartbeat(f"w{number}@here/a1", processes.WORKER, ["batch"]))
            many = {"scans": 1000, "chunk": 1} if number == 0 else {"scans": 1}
            if number < 10:
                make_job(session, JobKind.PREDICT_BATCH, tenant_id=f"t{number}", **many)  # type: ignore[arg-type]
        plans = []
        for _ in range(2):
            plans.append(scheduler.plan(snapshot(session, scheduler.units_to_read({})), {}))
            dispatch.dispatch(session, [unit.unit_id for unit in plans[-1].dispatch], 15)
        assert [(len(plan.dispatch), plan.read_more) for plan in plans] == [(8 + 4 + 9, True), (19, False)]


def test_units_that_wait_for_a_retry_stall_no_other_unit_of_their_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10, chunk=1)
        for unit in units_of(session, job)[:8]:
            lifecycle.fail(session, claim(session, unit), RETRYABLE, RetryPolicy(base=3600, cap=3600))
        assert [unit.unit_id for unit in snapshot(session, per_tenant=4).waiting] == [
            unit.id for unit in units_of(session, job)[8:]
        ]


def test_units_of_a_cancelled_job_are_not_dispatched(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=10, chunk=1)
        job.cancel_requested_at = session.scalar(select(NOW))
        session.flush()
        assert list(snapshot(session).waiting) == []


def test_a_new_unit_is_dispatched_by_its_place_if_it_may_be_claimed_in_one_of_the_lanes(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=30, chunk=10)
        units = units_of(session, job)
        lifecycle.fail(session, claim(session, units[1]), RETRYABLE, RetryPolicy(base=3600, cap=3600))
        assert dispatch.dispatch_new(session, str(job.id), 0, [Lane.URGENT, Lane.TRAIN]) is None, "another lane"
        assert dispatch.dispatch_new(session, str(job.id), 1, [Lane.BATCH]) is None, "it waits for its retry"
        assert dispatch.dispatch_new(session, str(job.id), 0, [Lane.URGENT, Lane.BATCH]) == WaitingUnit(
            units[0].id, Lane.BATCH, job.tenant_id, JobKind.PREDICT_BATCH, 10
        )
        assert dispatch.dispatch_new(session, str(job.id), 0, [Lane.BATCH]) is None, "it was dispatched"
        assert [unit.unit_id for unit in snapshot(session).waiting] == [units[2].id]
        job.cancel_requested_at = session.scalar(select(NOW))
        session.flush()
        assert dispatch.dispatch_new(session, str(job.id), 2, [Lane.BATCH]) is None, "its job is cancelled"


def test_explanations_come_after_all_predictions_of_their_tenant(sessions: Sessions) -> None:
    with sessions.begin() as session:
        older, younger = make_job(session, JobKind.PREDICT_BATCH, scans=2, chunk=1), make_job(session)
        explaining = units_of(session, older)[1]
        session.execute(update(Unit).where(Unit.id == explaining.id).values(explains=units_of(session, older)[0].id))
        job = make_job(session, JobKind.PREDICT_BATCH, scans=1)
        order = [unit.unit_id for unit in snapshot(session).waiting if unit.lane == Lane.BATCH]
        assert order == [units_of(session, older)[0].id, units_of(session, job)[0].id, explaining.id]
        assert younger.lane == Lane.TRAIN


def test_a_message_that_no_idle_worker_takes_is_late(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session, JobKind.PREDICT, scans=1)
        dispatch_all(session)
        assert (snapshot(session).dispatched, snapshot(session).late) == ({Lane.URGENT: 1}, {})
        _age_dispatches(session, 2)
        assert snapshot(session).late == {Lane.URGENT: 1}


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
        held = claim(session, units_of(session, batch)[0], "predict@here/a1/41")
        processes.upsert(session, Heartbeat("predict@here/a1", processes.WORKER, ["urgent", "batch"]))
        view = snapshot(session)
        (running,) = view.running
        assert (running.worker, running.can_yield, running.yield_requested) == ("predict@here/a1", True, False)
        assert view.workers == [dispatch.Worker("predict@here/a1", frozenset({Lane.URGENT, Lane.BATCH}))]
        dispatch.request_yield(session, [held.unit_id])
        assert leases.poll_status(session, held).yield_requested
        assert snapshot(session).running[0].yield_requested


def test_a_worker_that_was_started_again_is_not_busy_with_its_predecessors_unit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        batch = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        processes.register(session, Heartbeat("predict@here/a1", processes.WORKER, ["urgent", "batch"]))
        claim(session, units_of(session, batch)[0], "predict@here/a1/41")
        processes.register(session, Heartbeat("predict@here/b2", processes.WORKER, ["urgent", "batch"]))
        make_job(session, JobKind.PREDICT, scans=1)
        view = snapshot(session)
        assert [worker.name for worker in view.workers] == ["predict@here/b2"]
        plan = FairScheduler(128, 0.25, 5).plan(view, {})
        assert ([unit.lane for unit in plan.dispatch], plan.request_yield) == ([Lane.URGENT], [])


def test_released_unit_waits_before_the_next_dispatch(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        dispatch_all(session)
        dispatch.release(session, [units_of(session, job)[0].id], delay=5)
        assert list(snapshot(session).waiting) == []
        session.execute(text("UPDATE units SET not_before = not_before - interval '6 seconds'"))
        assert lifecycle.enqueue_due(session) == [str(job.id)]
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
        dispatch.dispatch_new(session, str(new_id()), 0, [])
        leases.claim_next(session, Lane.TRAIN, "w", 45)
        questions = [
            "EXECUTE snapshot (15, 64, 15, 1, true, '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}')",
            f"EXECUTE dispatch ('{{{job.id}}}', 15)",
            f"EXECUTE dispatch_new ('{job.id}', 0, '{{batch}}')",
            f"EXECUTE reserve ('{{{job.id}}}')",
            f"EXECUTE claim_unit ('{job.id}', 'w', 45)",
            "EXECUTE claim_next ('batch', 'w', 45)",
            pace.MEAN_UNIT_SECONDS.replace(":lanes", "'{batch,train,urgent}'"),
        ]
        for question in questions:
            plan = "\n".join(session.scalars(text("EXPLAIN " + question)))
            assert "Seq Scan on units" not in plan, plan
            assert "Seq Scan on jobs" not in plan, plan
            assert "snapshot" not in question or "ix_units_claimable" in plan, plan


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


# --- a reader that remembers ---


class Reading:
    """A reader whose clock is set by hand, and that hears what was notified."""

    def __init__(self, session: Session) -> None:
        self.session, self.now = session, 1000.0
        self.reader = QueueReader(clock=lambda: self.now)

    def read(self, *heard: str) -> QueueSnapshot:
        self.reader.notice(heard)
        return self.reader.read(self.session, redispatch_seconds=15, alive_seconds=15)

    def waiting(self, *heard: str) -> list[str]:
        return [str(unit.unit_id) for unit in self.read(*heard).waiting]


def test_reader_finds_what_it_is_told_of_and_everything_after_a_while(sessions: Sessions) -> None:
    with sessions.begin() as session:
        reading = Reading(session)
        assert reading.waiting() == []
        first, second = make_job(session), make_job(session, tenant_id="another")
        assert reading.waiting() == [], "nobody has told it"
        assert reading.waiting(str(second.id)) == [str(units_of(session, second)[0].id)]
        reading.now += 10
        assert set(reading.waiting()) == {str(units_of(session, job)[0].id) for job in (first, second)}


def test_reader_reads_everything_when_told_by_an_older_release(sessions: Sessions) -> None:
    with sessions.begin() as session:
        reading = Reading(session)
        reading.read()
        make_job(session)
        assert len(reading.waiting("ended")) == 0
        assert len(reading.waiting("")) == 1


def test_reader_follows_a_unit_from_waiting_to_running_and_back(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=30, chunk=10)
        reading = Reading(session)
        first, *others = [unit.unit_id for unit in reading.read().waiting]
        reading.reader.marked(dispatch.dispatch(session, [first], 15))
        view = reading.read()
        assert (view.dispatched, [unit.unit_id for unit in view.waiting]) == ({Lane.BATCH: 1}, others)
        held = claim(session, units_of(session, job)[0], "predict@here/a1/41")
        view = reading.read("ended")
        assert (view.dispatched, [unit.unit_id for unit in view.running]) == ({}, [first])
        lifecycle.requeue(session, held, "YIELDED")
        assert [unit.unit_id for unit in reading.read(str(job.id)).waiting] == [first, *others]
        assert reading.read().running == []


def test_reader_that_is_told_of_a_later_unit_still_finds_the_earlier_ones(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=4, chunk=1)
        units = [str(unit.id) for unit in units_of(session, job)]
        reading = Reading(session)
        assert reading.waiting() == units
        assert reading.waiting(place(job.id, 2)) == units
        claim(session, units_of(session, job)[0])
        assert reading.waiting("ended") == units[1:], "it goes on from the second unit from now on"
        session.execute(text("UPDATE units SET state = 'queued', lease_expires_at = NULL WHERE state = 'running'"))
        assert reading.waiting(place(job.id, 2)) == units[1:]
        assert reading.waiting(place(job.id, 3), place(job.id)) == units


def test_reader_knows_a_unit_that_a_busy_worker_claimed_by_itself(sessions: Sessions) -> None:
    with sessions.begin() as session:
        make_job(session)
        reading = Reading(session)
        (unit,) = [unit.unit_id for unit in reading.read().waiting]
        dispatch.reserve(session, [unit])
        reading.reader.marked([unit])
        assert [each.reserved for each in reading.read().waiting] == [True]
        assert leases.claim_next(session, Lane.TRAIN, "w@here/a1/1", 45) is not None
        assert [each.unit_id for each in reading.read().running] == [unit]


def test_verbs_tell_the_reader_which_job_has_new_claimable_units(sessions: Sessions) -> None:
    heard: list[str] = []
    with listening(sessions.kw["bind"], UNITS_CHANNEL) as notifications:
        with sessions.begin() as session:
            job = make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=10)
        heard += notifications.wait(5)
        assert heard == [str(job.id)]
        for end, ordinal in ((_requeue, 0), (_fail, 0), (_explain, 2)):
            with sessions.begin() as session:
                end(
                    session,
                    claim(session, next(u for u in units_of(session, job) if u.state in ("queued", "scheduled"))),
                )
            assert place(job.id, ordinal) in notifications.wait(5), end.__name__


def _requeue(session: Session, held: Claim) -> None:
    lifecycle.requeue(session, held, "DRAINED")


def _fail(session: Session, held: Claim) -> None:
    lifecycle.fail(session, held, RETRYABLE)


def _explain(session: Session, held: Claim) -> None:
    lifecycle.succeed(session, held, outcomes=outcomes_of(session, held), enqueue_explanations=True)


@pytest.mark.parametrize("kind", [JobKind.PREDICT_BATCH, JobKind.PREDICT])
def test_a_look_does_not_step_over_units_that_ended_while_a_transaction_is_open(
    settings: Settings, sessions: Sessions, kind: JobKind
) -> None:
    """A backup keeps the index entries of all units that end meanwhile."""
    pages: list[int] = []
    with planning_connection(settings.database_url) as own, own.begin() as looking, sessions() as backup:
        backup.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        backup.execute(text("SELECT count(*) FROM units"))
        reading = Reading(looking)
        for _ in range(200):
            with sessions.begin() as session:
                job = make_job(session, kind, scans=1)
            reading.reader.notice([str(job.id)])
            pages.append(_pages_of_a_look(reading))
            reading.reader.marked(dispatch.dispatch(looking, [unit.unit_id for unit in reading.read().waiting], 15))
            with sessions.begin() as session:
                held = claim(session, units_of(session, job)[0], "predict@here/a1/41")
                lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    assert max(pages[-20:]) <= 2 * max(pages[10:30]), pages[10:30] + pages[-20:]


def _pages_of_a_look(reading: Reading, waiting: int = 1) -> int:
    """How many pages the next look asks for, which finds so many units."""
    before = pages_read(reading.session)
    assert len(reading.read().waiting) == waiting
    return pages_read(reading.session) - before


UNITS = 400


def test_the_queue_does_not_step_over_ended_units_of_a_batch_while_a_transaction_is_open(
    settings: Settings, sessions: Sessions
) -> None:
    """Nor over the versions of the batch's row, of which each end leaves one: looks, claims and heartbeats."""
    pages: dict[str, list[int]] = {"look": [], "claim": [], "beat": []}
    with sessions.begin() as session:
        units = units_of(session, make_job(session, JobKind.PREDICT_BATCH, scans=UNITS + 80, chunk=1))
    with planning_connection(settings.database_url) as own, own.begin() as looking, sessions() as backup:
        backup.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        backup.execute(text("SELECT count(*) FROM units"))
        reading = Reading(looking)
        for number, unit in enumerate(units[:UNITS]):
            if number in (40, UNITS - 40):  # as autovacuum does: everything is planned anew
                with sessions.begin() as session:
                    session.execute(text("ANALYZE units, jobs"))
            pages["look"].append(_pages_of_a_look(reading, waiting=64))
            reading.reader.marked(dispatch.dispatch(looking, [unit.id], 15))
            before = pages_read(looking)
            held = claim(looking, unit, "predict@here/a1/41")
            claimed = pages_read(looking)
            leases.beat(looking, held, 45)
            pages["claim"].append(claimed - before)
            pages["beat"].append(pages_read(looking) - claimed)
            with sessions.begin() as session:
                lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    for question, read in pages.items():
        assert median(read[-20:]) <= 1.2 * median(read[50:70]), (question, read[50:70], read[-20:])
