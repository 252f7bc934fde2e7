"""A batch whose worker dies again and again, and one that is cancelled at its half."""

import time

import pytest

from tests.faults.rest import rest
from tests.faults.sabotage import Sabotage
from tests.faults.work import attempts, batch, expected, labels, single, tally, words, wrong
from tests.processes import Stack, eventually

pytestmark = pytest.mark.faults


def test_a_worker_killed_twice_in_the_middle_of_chunks(processes: Stack, plan: Sabotage) -> None:
    """kill -9 of the worker's tree at the 25th scan, and at the 33rd of the next → each scan its own result, once.

    Guard: a chunk's results are one fenced transaction with its end; what a dead worker had looked at is not written.
    """
    plan.network()
    deaths = [plan.at("worker.outcomes:Judge.of_prediction", "kill_tree", nth=nth) for nth in (25, 33)]
    processes.start("dispatcher")
    scans = words(100)
    job_id = batch(processes, scans)
    for number, death in enumerate(deaths):
        processes.start("predict", alias=f"predict-{number}", environ=plan.environ())
        eventually(death.happened, 30, processes.logs)
    processes.start("predict", environ=plan.environ())

    job = processes.wait_for(job_id)
    assert (job.state, job.succeeded) == ("succeeded", 100), processes.logs()
    assert labels(processes, job_id) == expected(scans)
    assert sorted(attempts(processes, job_id))[-2:] == [2, 2], "one chunk died with each worker"
    assert wrong(processes) == []


def test_a_batch_that_is_cancelled_at_its_half(processes: Stack, plan: Sabotage) -> None:
    """Cancel at half → what was done stays and pages out, the rest is cancelled, the device is free within the grace.

    Guard: what ends a unit writes the scans that are done by then with its end.
    """
    plan.network(seconds=0.02)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    scans = words(200)
    job_id = batch(processes, scans, chunk=20)
    eventually(lambda: processes.job(job_id).succeeded >= 100, 30, processes.logs)
    with rest(processes) as api:
        client = api.client()
        asked = time.monotonic()
        assert client.post(f"/jobs/{job_id}/cancel").status_code == 202
        job = processes.wait_for(job_id, 20)
        assert job.state == "cancelled"
        assert processes.wait_for(single(processes), 20).state == "succeeded"
        assert time.monotonic() - asked < processes.settings.cancel_grace_seconds + 3
        assert tally(processes, job_id) == {"succeeded": job.succeeded, "cancelled": job.cancelled}
        assert 100 <= job.succeeded < 200 == job.succeeded + job.cancelled
        assert job.succeeded % 20, "the scans of the interrupted chunk that were done are kept"
        rows, after = [], None
        while page := client.get(f"/jobs/{job_id}/results", query_string={"after": after} if after else {}).json:
            rows, after = rows + page["data"], page["next"]
            if not page["has_more"]:
                break
    assert [row["label"] for row in rows if row["state"] == "succeeded"] == expected(scans)[: job.succeeded]
    assert wrong(processes) == []
