"""Case 44 and its kin, with the clocks of production: what was killed and started again is idle at once, and what it
held waits for no lease."""

import uuid
from collections.abc import Iterator

import psutil
import pytest

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Job, Unit
from tests.faults.sabotage import Sabotage, StubNetwork
from tests.faults.work import batch, events, held, single, units, words, wrong
from tests.processes import Stack, count, eventually, stack

pytestmark = pytest.mark.faults


@pytest.fixture
def processes(settings: Settings, sessions: Sessions) -> Iterator[Stack]:
    """A stack with the default clocks: lease 45 s, beat 10 s."""
    production = Settings(
        home=settings.home, database_url=settings.database_url, redis_url=settings.redis_url, reuse_results=False
    )
    with stack(production, sessions) as empty:
        yield empty


def _paused_batch(processes: Stack, network: StubNetwork, plan: Sabotage) -> tuple[uuid.UUID, Unit]:
    """A batch whose only unit is held, half done."""
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    job_id = batch(processes, words(20, pause=5), chunk=20)
    eventually(network.paused, 60, processes.logs)
    (unit,) = units(processes, job_id)
    return job_id, unit


def _before_lease_end(unit: Unit, *jobs: Job) -> bool:
    """Whether the jobs ended while the lease of the dead attempt was still running."""
    return all(job.finished_at and unit.lease_expires_at and job.finished_at < unit.lease_expires_at for job in jobs)


def test_44_a_worker_that_is_started_again_under_its_name(processes: Stack, plan: Sabotage) -> None:
    """Killed and started again under its name, its old lease running for 45 s → an urgent scan and the old unit are
    done before that lease is over.

    Guard: the instance in the names of workers and claims. Without it the new worker counts as busy with the dead one's
    unit, and the urgent scan waits for its lease.
    """
    network = plan.network()
    job_id, unit = _paused_batch(processes, network, plan)
    processes.kill("predict")
    network.release()
    processes.start("predict", environ=plan.environ())
    urgent = processes.wait_for(single(processes))
    assert (urgent.state, urgent.attempt) == ("succeeded", 1), processes.logs()
    job = processes.wait_for(job_id)
    assert _before_lease_end(unit, urgent, job)
    (requeued,) = events(processes, job_id, "requeued")
    assert (requeued.data["reason"], job.state, job.succeeded) == ("WORKER_LOST", "succeeded", 20)
    assert units(processes, job_id)[0].failures == 1, (
        "a scan that kills its worker each time must not be tried for ever"
    )
    assert count(processes.sessions, "SELECT count(*) FROM processes WHERE kind = 'worker'") == 1
    assert wrong(processes) == []


def test_44b_a_pool_child_that_is_killed(processes: Stack, plan: Sabotage) -> None:
    """The pool's child alone is killed → the next child takes back what it held, and serves an urgent scan at once.

    Guard: a child that starts takes back the units of children of its worker that are gone.
    """
    network = plan.network()
    job_id, unit = _paused_batch(processes, network, plan)
    psutil.Process(int(str(unit.worker).rsplit("/", 1)[1])).kill()
    network.release()
    urgent, job = processes.wait_for(single(processes)), processes.wait_for(job_id)
    assert (urgent.state, job.state, job.succeeded) == ("succeeded", "succeeded", 20), processes.logs()
    assert _before_lease_end(unit, urgent, job)
    assert wrong(processes) == []


def test_44c_a_worker_that_starts_takes_nothing_from_others(processes: Stack, plan: Sabotage) -> None:
    """A second worker of another name starts while the first one holds a unit → the unit stays where it is."""
    network = plan.network()
    job_id, _ = _paused_batch(processes, network, plan)
    processes.start("predict", "predict2", environ=plan.environ())
    processes.alive(2)
    assert held(processes, job_id)
    network.release()
    assert processes.wait_for(job_id).state == "succeeded"
    assert events(processes, job_id, "requeued") == []
    assert wrong(processes) == []


def test_24b_a_dispatcher_that_leads_is_killed(processes: Stack, plan: Sabotage) -> None:
    """Three dispatchers, the leading one killed → the others go on; nothing is sent twice.

    Guard: the advisory lock, which ends with the leader's connection.
    """
    plan.network()
    names = ["first", "second", "third"]
    for name in names:
        processes.start("dispatcher", name)
    processes.start("predict", environ=plan.environ())
    for _ in range(2):
        assert processes.wait_for(single(processes)).state == "succeeded", processes.logs()
        leader = max(names, key=lambda name: processes.log(name).count('"leading"'))
        processes.kill(leader)
        names.remove(leader)
    last = single(processes)
    assert processes.wait_for(last).state == "succeeded", processes.logs()
    assert [unit.rings for unit in units(processes, last)] == [1]
    assert wrong(processes) == []
