"""Cases 1–16 of the acceptance: whatever process dies, hangs or lags, each scan has one result and each job one end."""

import signal
import time
import uuid
from collections import Counter

import pytest

from jobs.queue import leases, lifecycle
from jobs.queue.leases import Claim
from jobs.settings import Settings
from tests.builders import claim, outcomes_of
from tests.faults.sabotage import Sabotage
from tests.faults.work import attempts, batch, events, expected, labels, single, tally, units, words, wrong
from tests.processes import Stack, eventually, stack

pytestmark = pytest.mark.faults


def test_01_a_worker_whose_whole_tree_is_killed_at_chunk_3_of_10(processes: Stack, plan: Sabotage) -> None:
    """kill -9 the worker's tree at chunk 3 of 10 → 100 of 100 results, that chunk attempt 2.

    Guard: the reaper, which takes back a unit whose lease is over. Without it the chunk runs for ever and the job never
    ends.
    """
    network = plan.network()
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    scans = words(100, pause=25)
    job_id = batch(processes, scans)
    eventually(network.paused, 30, processes.logs)
    processes.kill("predict")
    network.release()
    processes.start("predict", environ=plan.environ())

    job = processes.wait_for(job_id)
    assert (job.state, job.succeeded) == ("succeeded", 100), processes.logs()
    assert [n for n, (got, want) in enumerate(zip(labels(processes, job_id), expected(scans), strict=True))
            if got != want and want is not None] == []  # fmt: skip
    assert attempts(processes, job_id) == [1, 1, 2, 1, 1, 1, 1, 1, 1, 1]
    assert wrong(processes) == []


def test_02_a_pool_child_that_is_killed(processes: Stack, plan: Sabotage) -> None:
    """kill -9 the pool child → requeued within lease + 15 s.

    Guard: the lease. Without the reaper the unit stays with a process that is gone; with Celery's own bookkeeping it
    would be FAILURE and never run again.
    """
    plan.network()
    death = plan.at("worker.handlers.predict:predict_chunk", "kill", nth=2)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(30))

    job = processes.wait_for(job_id)
    assert (job.state, job.succeeded) == ("succeeded", 30), processes.logs()
    (requeued,) = events(processes, job_id, "requeued")
    assert requeued.data["reason"] == "WORKER_LOST"
    assert requeued.at.timestamp() - death.at < processes.settings.lease_seconds + 15
    assert sorted(attempts(processes, job_id)) == [1, 1, 2]
    assert wrong(processes) == []


def test_03_a_worker_killed_between_taking_the_message_and_starting(processes: Stack, plan: Sabotage) -> None:
    """kill -9 between taking the message and starting → rung again.

    Guard: the dispatcher rings again for every unit that nobody claimed in time. Without it the one message is gone,
    and the unit stays `dispatched` for ever.
    """
    plan.network()
    death = plan.at("worker.execution.running:running", "kill_tree")
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = single(processes)
    eventually(death.happened, 30, processes.logs)
    processes.running["predict"].wait(10)
    assert units(processes, job_id)[0].attempt == 0, "it was not claimed"
    processes.start("predict", "another", environ=plan.environ())

    assert processes.wait_for(job_id).state == "succeeded", processes.logs()
    (unit,) = units(processes, job_id)
    assert (unit.attempt, unit.failures) == (1, 0)
    assert unit.rings >= 2
    assert wrong(processes) == []


def test_04_messages_that_a_dead_worker_had_taken_ahead(processes: Stack, plan: Sabotage) -> None:
    """Messages prefetched by a dead worker → none stranded.

    Guard: ringing again, and `worker_disable_prefetch`, which leaves messages in Redis for others. Without both they go
    with the worker.
    """
    plan.network()
    pause = plan.at("worker.execution.running:running", "pause")
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    processes.alive()
    jobs = [single(processes) for _ in range(8)]
    eventually(pause.happened, 30, processes.logs)
    eventually(lambda: any(units(processes, job_id)[0].rings > 1 for job_id in jobs), 30, processes.logs)
    processes.kill("predict")
    processes.start("predict", "another", environ=plan.environ())

    assert [processes.wait_for(job_id).state for job_id in jobs] == ["succeeded"] * 8, processes.logs()
    assert [attempts(processes, job_id) for job_id in jobs] == [[1]] * 8
    assert wrong(processes) == []


def test_05_a_unit_longer_than_the_visibility_timeout(processes: Stack, plan: Sabotage) -> None:
    """A unit longer than the visibility timeout → one execution.

    Guard: the claim, which refuses the second delivery of the same message. Here even late acknowledgement is switched
    on, with a time-out of one second, so that Redis does deliver it again. Without `state IN (queued, dispatched)` in
    the claim's UPDATE the scan is looked at twice.
    """
    network = plan.network()
    plan.celery({"task_acks_late": True}, {"visibility_timeout": 1})
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = single(processes, "pause")
    eventually(network.paused, 30, processes.logs)
    time.sleep(1.1)  # the visibility timeout: the one thing here that only time brings about
    processes.start("predict", "another", environ=plan.environ())  # takes what is overdue as soon as it starts
    eventually(lambda: "claim_refused" in processes.log("another"), 30, processes.logs)
    network.release()

    assert processes.wait_for(job_id).state == "succeeded", processes.logs()
    assert len(network.seen()) == 1, "one execution"
    assert attempts(processes, job_id) == [1]
    assert wrong(processes) == []


def test_06_a_worker_asked_to_stop_and_then_killed(processes: Stack, plan: Sabotage) -> None:
    """SIGTERM, then SIGKILL at the end of the grace → resumes; the drain is not a failure.

    Guard: a drain hands the unit back with what is done, and counts no failure. Without it the kill would have cost the
    five scans before it, and the unit a failure.
    """
    network = plan.network()
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(10, pause=5))
    eventually(network.paused, 30, processes.logs)
    processes.running["predict"].send_signal(signal.SIGTERM)
    eventually(lambda: tally(processes, job_id)["succeeded"] == 5, 15, processes.logs)
    processes.kill("predict")
    network.release()
    processes.start("predict", "another", environ=plan.environ())

    job = processes.wait_for(job_id)
    assert (job.state, job.succeeded, job.attempt) == ("succeeded", 10, 2), processes.logs()
    assert [event.data["reason"] for event in events(processes, job_id, "requeued")] == ["DRAINED"]
    assert units(processes, job_id)[0].failures == 0
    assert Counter(ordinal for _, ordinal, _ in network.seen())[0] == 1, "what was done was not done again"
    assert wrong(processes) == []


def test_07_a_unit_that_kills_its_worker_every_time(processes: Stack, plan: Sabotage) -> None:
    """A unit that kills its worker every time → stops at 3, failed with WORKER_LOST.

    Guard: the count of failures in the row. Without `failures + 1 < max_failures` it kills workers without end.
    """
    network = plan.network()
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = single(processes, "poison")

    job = processes.wait_for(job_id)
    assert (job.state, job.failed, job.attempt) == ("failed", 1, 3), processes.logs()
    assert job.error is not None
    assert job.error["code"] == "WORKER_LOST"
    assert len({pid for pid, _, _ in network.seen()}) == 3
    assert processes.wait_for(single(processes)).state == "succeeded", "the worker is there for others"
    assert wrong(processes) == []


def test_08_one_poison_scan_in_a_batch(processes: Stack, plan: Sabotage) -> None:
    """One poison scan in a batch → that scan fails alone, all others succeed.

    Guard: the split of a chunk that has killed its worker twice. Without it all eight scans fail at the third death.
    """
    plan.network()
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    scans = words(8, poison=4)
    job_id = batch(processes, scans)

    job = processes.wait_for(job_id, 90)
    assert (job.state, job.succeeded, job.failed) == ("partially_succeeded", 7, 1), processes.logs()
    assert labels(processes, job_id) == expected(scans)
    assert wrong(processes) == []


def test_09_a_worker_stopped_past_its_lease_that_comes_back(processes: Stack, plan: Sabotage) -> None:
    """SIGSTOP past the lease, then SIGCONT → the stale write is refused, counters exact.

    Guard: the fence in the WHERE of every write. Without it the stopped worker ends the unit a second time
    (test_mutations shows that).
    """
    network = plan.network()
    stop = plan.at("jobs.queue.lifecycle:succeed", "stop")
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(10))
    eventually(stop.happened, 30, processes.logs)
    processes.pause("predict")
    processes.start("predict", "another", environ=plan.environ())
    job = processes.wait_for(job_id)
    before = (job.state, job.succeeded, job.attempt, job.device_seconds)
    assert before[:3] == ("succeeded", 10, 2), processes.logs()

    processes.resume("predict")
    eventually(lambda: "lease_lost" in processes.log("predict"), 30, processes.logs)
    job = processes.job(job_id)
    assert (job.state, job.succeeded, job.attempt, job.device_seconds) == before
    assert len(network.seen()) == 20, "both looked at all; one was heard"
    assert wrong(processes) == []


def test_10_a_unit_that_ends_while_the_reaper_looks_at_it(processes: Stack, plan: Sabotage) -> None:
    """Reaper reads, worker completes, reaper writes → stays succeeded.

    Guard: the reaper's UPDATE asks for state, fence and expiry again. Without that it sends an ended unit back to the
    queue (test_mutations shows that).
    """
    read = plan.at("jobs.queue.reaping:_reap_one", "pause")
    written = plan.at("jobs.queue.reaping:_reap_one", "note", when="after")
    job_id = batch(processes, words(4))
    with processes.sessions.begin() as session:
        held = claim(session, units(processes, job_id)[0], lease=0.1)
    processes.start("dispatcher", environ=plan.environ())
    eventually(read.happened, 30, processes.logs)
    with processes.sessions.begin() as session:
        lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
    read.release()
    eventually(written.happened, 30, processes.logs)

    job = processes.job(job_id)
    assert (job.state, job.succeeded, job.attempt) == ("succeeded", 4, 1)
    assert not events(processes, job_id, "requeued")
    assert wrong(processes) == []


def test_11_an_old_attempt_that_completes_after_a_new_claim(processes: Stack, plan: Sabotage) -> None:
    """An old attempt completes after a new claim → refused.

    Guard: the fence. Without it the old attempt ends the unit under the new one's hands.
    """
    plan.network()
    stop = plan.at("jobs.queue.lifecycle:succeed", "stop")
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(10))
    eventually(stop.happened, 30, processes.logs)
    processes.pause("predict")  # its parent as well, so that it takes no second message
    fresh = eventually(lambda: _claimed_anew(processes, job_id), 30, processes.logs)
    processes.resume("predict")
    eventually(lambda: "lease_lost" in processes.log("predict"), 30, processes.logs)
    assert units(processes, job_id)[0].state == "running", "the new attempt holds it still"
    assert tally(processes, job_id) == {"pending": 10}
    with processes.sessions.begin() as session:
        lifecycle.succeed(session, fresh, outcomes=outcomes_of(session, fresh))

    assert processes.wait_for(job_id).attempt == 2
    assert wrong(processes) == []


def _claimed_anew(processes: Stack, job_id: uuid.UUID) -> Claim | None:
    """The unit, once it was taken back and its wait is over."""
    with processes.sessions.begin() as session:
        return leases.claim(session, units(processes, job_id)[0].id, "the new attempt", 60)


def test_12_a_worker_that_dies_before_its_first_beat(processes: Stack, plan: Sabotage) -> None:
    """Death before the first beat → reaped.

    Guard: the claim itself sets the lease. If only the first beat did, nobody would ever take the unit back.
    """
    plan.network(seconds=0.2)
    death = plan.at("jobs.queue.leases:beat", "kill")
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(10))

    job = processes.wait_for(job_id)
    assert death.happened()
    assert (job.state, job.succeeded, job.attempt) == ("succeeded", 10, 2), processes.logs()
    assert [event.data["reason"] for event in events(processes, job_id, "requeued")] == ["WORKER_LOST"]
    assert wrong(processes) == []


def test_15_a_device_without_enough_memory(processes: Stack, plan: Sabotage) -> None:
    """Device out of memory → half the batch once, then failed with DEVICE_OOM.

    Guard: `ml.image.engines.oom_fallback`, which tries once more with half the batch. Without it the first device
    that is a little too small fails every scan.
    """
    plan.network(memory_for=6)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    fits = processes.wait_for(batch(processes, words(10)))
    assert (fits.state, fits.succeeded, fits.attempt) == ("succeeded", 10, 1), processes.logs()
    processes.kill("predict")

    (processes.settings.home / "smaller").mkdir()
    smaller = Sabotage(processes.settings.home / "smaller")
    smaller.network(memory_for=1)
    processes.start("predict", "another", environ=smaller.environ())
    job_id = batch(processes, words(10))
    never = processes.wait_for(job_id)
    assert (never.state, never.failed) == ("failed", 10), processes.logs()
    assert never.error is not None
    assert never.error["code"] == "DEVICE_OOM"
    assert wrong(processes) == []


def test_16_a_loop_that_hangs_while_its_worker_beats(fast: Settings, processes: Stack, plan: Sabotage) -> None:
    """Beats go on but the loop hangs → ended at the stall limit, STALLED.

    Guard: `progress_at` in the reaper's question. Without it the beats keep the unit alive for ever.
    """
    short = fast.model_copy(update={"stall_seconds": 3, "max_failures": 1})
    plan.network()
    with stack(short, processes.sessions, "dispatcher") as stalling:
        stalling.start("predict", environ=plan.environ())
        job_id = single(stalling, "hang")
        job = stalling.wait_for(job_id)
        assert (job.state, job.attempt) == ("failed", 1), stalling.logs()
        assert job.error is not None
        assert job.error["code"] == "STALLED"
        assert job.started_at is not None
        assert job.finished_at is not None
        assert (job.finished_at - job.started_at).total_seconds() > short.lease_seconds, "its beats kept the lease"
        assert stalling.wait_for(single(stalling)).state == "succeeded", "the worker has freed itself"
        assert wrong(stalling) == []
