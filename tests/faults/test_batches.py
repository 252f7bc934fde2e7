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
    deaths = [
        plan.at("worker.handlers.outcomes:DispositionPolicy.from_prediction", "kill_tree", nth=nth) for nth in (25, 33)
    ]
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
    # Of one chunk or of two: the second worker may find the first one's again, if it takes long to start.
    assert sum(attempt - 1 for attempt in attempts(processes, job_id)) == 2, "one attempt died with each worker"
    assert wrong(processes) == []


def test_a_batch_that_is_cancelled_at_its_half(processes: Stack, plan: Sabotage) -> None:
    """Cancel at half → what was done stays and pages out, the rest is cancelled, the device is free within the grace.

    Guard: what ends a unit writes the scans that are done by then with its end.
    """
    network = plan.network(seconds=0.1)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    scans = words(60, pause=22)
    job_id = batch(processes, scans, chunk=20)
    with rest(processes) as api:
        client = api.client()
        eventually(network.paused, 30, processes.logs)
        asked = time.monotonic()
        assert client.post(f"/jobs/{job_id}/cancel").status_code == 202
        network.release()  # 17 scans of the chunk are left: 1.7 s
        job = processes.wait_for(job_id, 20)
        assert job.state == "cancelled"
        assert processes.wait_for(single(processes), 20).state == "succeeded"
        assert time.monotonic() - asked < processes.settings.cancel_grace_seconds + 3
        assert tally(processes, job_id) == {"succeeded": job.succeeded, "cancelled": job.cancelled}
        assert 22 <= job.succeeded < 40, "what was done of the interrupted chunk is kept, no more"
        assert job.succeeded + job.cancelled == 60
        rows, after = [], None
        while page := client.get(f"/jobs/{job_id}/results", query_string={"after": after} if after else {}).json:
            rows, after = rows + page["data"], page["next"]
            if not page["has_more"]:
                break
    found = [row["label"] for row in rows if row["state"] == "succeeded"]
    assert len(found) == job.succeeded
    assert all(right in (None, label) for label, right in zip(found, expected(scans), strict=False))
    assert wrong(processes) == []
