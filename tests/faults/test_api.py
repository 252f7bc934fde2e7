"""Cases 28–33 of the acceptance: what clients do at the same time, too late, or too much of."""

import base64
import datetime as dt
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, TypeVar

import psutil
import pytest

from jobs.queue import lifecycle
from jobs.tables import Job
from tests.api.conftest import png
from tests.builders import TENANT
from tests.faults.rest import rest
from tests.faults.sabotage import Sabotage
from tests.faults.work import attempts, batch, champion, events, held, single, training, units, words, wrong
from tests.processes import Stack, count, eventually

pytestmark = pytest.mark.faults
T = TypeVar("T")


def at_once(number: int, call: Callable[[], T]) -> list[T]:
    """The answers of so many threads that begin together."""
    start = threading.Barrier(number)

    def one(_: int) -> T:
        start.wait(30)
        return call()

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


def test_28_one_idempotency_key_fifty_times_at_once(processes: Stack) -> None:
    """One Idempotency-Key, 50 at once → one job; another body → 422.

    Guard: the key's row, locked by the first to insert it, and the unique index on the job's key. Without both there
    are as many jobs as requests.
    """
    champion(processes)
    before = count(processes.sessions, "SELECT count(*) FROM jobs")
    with rest(processes) as api:
        secret = api.client().environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")

        def post(shade: int = 7) -> Any:
            body = {"image": base64.b64encode(png(shade=shade)).decode()}
            headers = {"Idempotency-Key": "one-and-only"}
            return api.with_key(secret).post("/jobs/predict", json=body, headers=headers)

        answers = at_once(50, post)
        by_status = Counter(answer.status_code for answer in answers)
        assert set(by_status) <= {202, 409}, "the first answer, or: it is still being made"
        assert all(answer.headers["Retry-After"] for answer in answers)
        again = post()
        assert again.status_code == 202
        assert {answer.json["id"] for answer in answers if answer.status_code == 202} == {again.json["id"]}
        assert post(shade=8).status_code == 422
    assert count(processes.sessions, "SELECT count(*) FROM jobs") == before + 1
    assert wrong(processes, ended=False) == []


def test_29_cancel_of_queued_running_and_finishing(processes: Stack, plan: Sabotage) -> None:
    """Cancel of queued, running, finishing → one winner; 409 after the end; device free within the grace.

    Guard: one locked row decides: `cancel` and `succeed` take the job's lock, and `jobs_move_legally` refuses a second
    end. The child's process group is killed at the end of the grace; without that a child that ignores SIGTERM keeps
    the device.
    """
    plan.network()
    plan.training(seconds=0.2, stubborn=True)
    finishing = plan.at("jobs.queue.lifecycle:succeed", "pause")
    with rest(processes) as api:
        client = api.client()
        queued = single(processes)
        secret = client.environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")
        answers = at_once(8, lambda: api.with_key(secret).post(f"/jobs/{queued}/cancel"))
        assert Counter((a.status_code, a.json["state"]) for a in answers) == {(202, "cancelled"): 8}

        processes.start("dispatcher")
        processes.start("predict", environ=plan.environ())
        processes.start("train", environ=plan.environ())
        running, ending = training(processes, epochs=1000), batch(processes, words(10))
        eventually(lambda: events(processes, running, "epoch"), 30, processes.logs)
        asked = time.monotonic()
        assert client.post(f"/jobs/{running}/cancel").status_code == 202
        assert processes.wait_for(running, 20).state == "cancelled"
        assert time.monotonic() - asked < processes.settings.cancel_grace_seconds + 3
        tree = psutil.Process(processes.running["train"].pid).children(recursive=True)
        assert not [child for child in tree if "ml" in child.cmdline()], "the device is free"

        eventually(finishing.happened, 30, processes.logs)
        assert client.post(f"/jobs/{ending}/cancel").status_code == 202
        finishing.release()
        winner = processes.wait_for(ending).state
        assert winner in ("succeeded", "cancelled")
        assert client.post(f"/jobs/{ending}/cancel").status_code == {"succeeded": 409, "cancelled": 202}[winner]
        done = processes.wait_for(single(processes))
        assert client.post(f"/jobs/{done.id}/cancel").status_code == 409
    assert wrong(processes) == []


def test_30_a_cancelled_job_whose_worker_restarts(processes: Stack, plan: Sabotage) -> None:
    """Cancel, then the worker restarts → stays cancelled.

    Guard: the claim asks whether the job has ended or was cancelled; a unit that comes back to such a job ends. With
    Celery's revoke, which lives in the workers' memory, the task ran.
    """
    network = plan.network()
    processes.start("dispatcher")
    rung = single(processes)
    eventually(lambda: units(processes, rung)[0].state == "dispatched", 30, processes.logs)  # its message waits
    _cancel(processes, rung)
    processes.start("predict", environ=plan.environ())
    eventually(lambda: "claim_refused" in processes.log("predict"), 30, processes.logs)

    running = batch(processes, words(10, pause=5))
    eventually(network.paused, 30, processes.logs)
    processes.kill("predict")
    _cancel(processes, running)
    network.release()
    processes.start("predict", "another", environ=plan.environ())
    assert processes.wait_for(running).state == "cancelled", processes.logs()
    assert processes.wait_for(single(processes)).state == "succeeded", "it works"
    assert processes.job(rung).state == "cancelled"
    assert (attempts(processes, rung), attempts(processes, running)) == ([0], [1])
    assert wrong(processes) == []


def _cancel(processes: Stack, job_id: uuid.UUID) -> None:
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, TENANT, job_id)


CHUNK = 128


def test_31_an_urgent_scan_behind_ten_thousand(processes: Stack, plan: Sabotage) -> None:
    """A 10,000-scan batch, then an urgent scan → urgent starts within one chunk + 2 s.

    Guard: at most a few chunks are rung at a time, urgent is a lane of its own, and its queue is read first. Were the
    whole batch in one Redis list, the urgent scan would wait for 79 chunks.
    """
    seconds = 0.01
    plan.network(seconds)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    large = batch(processes, words(10_000), chunk=CHUNK)
    eventually(lambda: held(processes, large), 30, processes.logs)
    for _ in range(3):
        urgent = processes.wait_for(single(processes), 30)
        assert urgent.state == "succeeded"
        assert urgent.started_at is not None
        waited = (urgent.started_at - urgent.created_at).total_seconds()
        assert waited < CHUNK * seconds + 2, processes.logs()
    assert processes.job(large).finished_at is None, "it overtook the batch"
    _cancel(processes, large)
    processes.wait_for(large)
    assert wrong(processes) == []


def test_32_ten_scans_of_one_tenant_behind_ten_thousand_of_another(processes: Stack, plan: Sabotage) -> None:
    """Tenant A 10,000 scans, tenant B 10 → B done within 3× its time alone.

    Guard: deficit round robin between tenants, and the newcomer's right to ask a running chunk to hand back its rest.
    Without the second, B waits for the end of A's chunk: here 6 s against 0.5.
    """
    plan.network(seconds=0.05)
    processes.start("dispatcher")
    processes.start("predict", environ=plan.environ())
    _taken(processes, single(processes, tenant_id="b"))  # the worker is warm
    alone = _taken(processes, batch(processes, words(10), chunk=CHUNK, tenant_id="b"))
    large = batch(processes, words(10_000), chunk=CHUNK, tenant_id="a")
    eventually(lambda: held(processes, large), 30, processes.logs)
    behind = _taken(processes, batch(processes, words(10), chunk=CHUNK, tenant_id="b"))
    assert behind < 3 * alone, processes.logs()
    assert processes.job(large).finished_at is None
    with processes.sessions.begin() as session:
        lifecycle.cancel(session, "a", large)
    processes.wait_for(large)
    assert wrong(processes) == []


def _taken(processes: Stack, job_id: uuid.UUID) -> float:
    """Seconds from the job's submit to its end."""
    job: Job = processes.wait_for(job_id)
    assert job.state == "succeeded", processes.logs()
    return ((job.finished_at or dt.datetime.max) - job.created_at).total_seconds()


def test_33_past_the_quota_and_past_the_ceiling(processes: Stack) -> None:
    """Past the quota → 429; past the ceiling of the queue → 503; memory bounded.

    Guard: a tenant's load is one row, counted up and compared in the same statement as the submit. Without it the queue
    grows until the disk is full; counted apart from the submit, 20 at once would all pass.
    """
    for tenant_id in ("a", "b", "c"):
        champion(processes, tenant_id)
    with rest(processes, quota_scans=50, quota_batches=4, queue_ceiling=60) as api:
        secret = api.client("a").environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")
        answers = at_once(20, lambda: _post(api.with_key(secret), files=2))
        assert Counter(answer.status_code for answer in answers) == {202: 4, 429: 16}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert (int(refused.headers["Retry-After"]) > 0, refused.json["code"]) == (True, "QUOTA_EXCEEDED")
        assert _post(api.client("b"), files=50).status_code == 202
        full = _post(api.client("c"), files=3)
        assert (full.status_code, full.json["code"]) == (503, "QUEUE_FULL")
        assert int(full.headers["Retry-After"]) > 0

        stored = count(processes.sessions, "SELECT count(*) FROM scans")
        client, before = api.with_key(secret), psutil.Process().memory_info().rss
        assert {_post(client, files=20, size=400).status_code for _ in range(20)} <= {429, 503}
        assert psutil.Process().memory_info().rss - before < 50_000_000
        assert count(processes.sessions, "SELECT count(*) FROM scans") == stored, "what is refused is not kept"

        accepted = next(answer for answer in answers if answer.status_code == 202)
        assert client.post(f"/jobs/{accepted.json['id']}/cancel").json["state"] == "cancelled"
        assert _post(client, files=2).status_code == 202, "there is room again"
    assert wrong(processes, ended=False) == []


def _post(client: Any, files: int, size: int = 8) -> Any:
    """A batch of so many pictures."""
    pictures = [(BytesIO(png(size, size, shade)), f"{shade}.png") for shade in range(files)]
    return client.post("/jobs/predict/batch", data={"files": pictures})
