"""Prometheus: every metric is declared, documented and scraped; totals outlive their jobs; no tenant sees the stack."""

import re
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.metrics_core import Metric as Parsed
from prometheus_client.parser import text_string_to_metric_families as parsed
from sqlalchemy import delete, text
from sqlalchemy.orm import Session

from api.http.traffic.request_counts import RequestCounts
from api.resources.metrics.families import FAMILIES, Kind
from jobs import monitoring
from jobs.db import Sessions
from jobs.monitoring import RequestKind
from jobs.queue import lifecycle, processes, reaping
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.processes import Heartbeat
from jobs.states import JobKind, JobState
from jobs.tables import Job
from tests import builders
from tests.api.conftest import ALL_SCOPES, Door
from tests.plans import most_rows

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(renalq_\w+)(?:\{([\w,]+)\})?` \| (\w+) \|", re.MULTILINE)
BROKEN = {"code": "DEVICE_OOM", "detail": "No memory.", "retryable": True}
LOST = RetryPolicy(max_failures=3)


@pytest.fixture
def operator(door: Door) -> FlaskClient:
    """A client that sees the whole stack."""
    return door.client(*ALL_SCOPES, "operator")


def scrape(client: FlaskClient) -> dict[str, Parsed]:
    return {family.name: family for family in parsed(client.get("/metrics").get_data(as_text=True))}


def values(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """Name and labels, in the order in which they are declared → value."""
    order = {one.name.removesuffix("_total"): one.labels for one in FAMILIES}
    return {
        (sample.name, *(sample.labels[label] for label in (*order[name], "le") if label in sample.labels)): sample.value
        for name, family in scrape(client).items()
        for sample in family.samples
    }


def test_the_documentation_has_all_metrics_with_their_labels_and_no_other() -> None:
    documented = [(name, labels or "", kind) for name, labels, kind in ROW.findall(DOCS.read_text())]
    assert documented == [(one.name, ",".join(one.labels), str(one.kind)) for one in FAMILIES]


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert (family.kind == Kind.COUNTER) == family.name.endswith("_total"), family
        assert family.kind != Kind.HISTOGRAM or family.name.endswith("_seconds"), family
        assert not {"tenant", "job", "key", "name"} & set(family.labels), "a label for each would have no end"


def failed(session: Session, times: int, **job: Any) -> None:
    """A unit that failed so often."""
    made = builders.make_job(session, JobKind.PREDICT_BATCH, scans=1, **job)
    for _ in range(times):
        (unit,) = builders.units_of(session, made)
        lifecycle.fail(session, builders.claim(session, unit), BROKEN, LOST)


def test_every_metric_that_is_declared_is_scraped(operator: FlaskClient, sessions: Sessions, champion: Any) -> None:
    with sessions.begin() as session:
        builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=3)
        builders.make_job(session, JobKind.PREDICT_BATCH, scans=3)
        failed(session, 3)
        processes.upsert(session, Heartbeat("predict@a/1", processes.WORKER, ["urgent"], device="NVIDIA H200"))
    found = scrape(operator)
    wanted = {one.name.removesuffix("_total"): str(one.kind) for one in FAMILIES}
    assert {name: family.type for name, family in found.items()}.items() <= wanted.items()
    needs_feedback = {"renalq_drift_psi", "renalq_drift_limit", "renalq_rejected_share", "renalq_model_accuracy"}
    assert set(wanted) - set(found) <= needs_feedback  # tests/api/test_drift.py has these
    for family in FAMILIES:
        samples = found.get(family.name.removesuffix("_total"))
        assert samples is None or all(set(family.labels) <= set(one.labels) for one in samples.samples)


def test_totals_count_what_has_ended_and_outlive_it(
    client: FlaskClient, stranger: FlaskClient, operator: FlaskClient, sessions: Sessions
) -> None:
    with sessions.begin() as session:
        builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=3)
        builders.make_job(session, JobKind.PREDICT_BATCH, JobState.CANCELLED, scans=2)
        builders.make_job(session, JobKind.TRAIN, JobState.SUCCEEDED)
        failed(session, 3)
        builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=5, tenant_id="elsewhere")
        running = builders.make_job(session, JobKind.PREDICT_BATCH, scans=4, chunk=2)
        held = builders.claim(session, builders.units_of(session, running)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    before = values(client)
    assert before["renalq_jobs_ended_total", "predict_batch", "succeeded"] == 1
    assert before["renalq_jobs_ended_total", "predict_batch", "failed"] == 1
    assert before["renalq_jobs_ended_total", "train", "succeeded"] == 1
    assert before["renalq_scans_total", "succeeded"] == 3 + 2, "of the running job too"
    assert (before["renalq_scans_total", "failed"], before["renalq_scans_total", "cancelled"]) == (1, 2)
    assert before["renalq_unit_retries_total", "predict_batch", "DEVICE_OOM"] == 2
    assert before["renalq_unit_failures_total", "predict_batch", "DEVICE_OOM"] == 1
    assert before["renalq_job_queue_seconds_count", "predict_batch"] == 3
    assert before["renalq_job_queue_seconds_bucket", "predict_batch", "+Inf"] == 3
    assert values(stranger)["renalq_scans_total", "succeeded"] == 5
    assert values(operator)["renalq_stack_scans_total", "succeeded"] == 10
    with sessions.begin() as session:  # as retention does
        session.execute(delete(Job).where(Job.finished_at.is_not(None)))
    after = values(client)
    totals = {name: value for name, value in before.items() if "_total" in name[0] or "_seconds" in name[0]}
    assert {name: after[name] for name in totals} == totals


def test_a_lost_lease_is_counted_also_of_a_cancelled_job(operator: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        for cancelled in (False, True):
            job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=1)
            (unit,) = builders.units_of(session, job)
            builders.claim(session, unit, lease=-1)
            if cancelled:
                lifecycle.cancel(session, job.tenant_id, job.id)
    for _ in range(2):
        with sessions.begin() as session:
            assert reaping.reap(session, retry=LOST, stall=900) == 1
    assert values(operator)["renalq_stack_leases_lost_total", "predict_batch", "WORKER_LOST"] == 2


def test_the_stack_is_shown_to_operators_only(client: FlaskClient, door: Door) -> None:
    assert not [name for name in scrape(client) if name.startswith("renalq_stack_")]
    assert door.client("operator").get("/metrics").status_code == 403
    assert "renalq_stack_queue_scans" in scrape(door.client("jobs:read", "operator"))


# --- requests ---


def test_requests_are_counted_by_route_and_status(operator: FlaskClient) -> None:
    for path in ("/jobs", "/jobs", "/jobs/" + "0" * 8, "/nothing/of/a-patient"):
        operator.get(path)
    found = values(operator)
    name = "renalq_stack_http_requests_total"
    assert (found[name, "GET", "/jobs", "200"], found[name, "GET", "/jobs/<id:job_id>", "404"]) == (2, 1)
    assert found[name, "GET", "", "404"] == 1
    assert "patient" not in str(found)
    latency = "renalq_stack_http_request_duration_seconds"
    assert found[f"{latency}_count", "GET", "/jobs"] == found[f"{latency}_bucket", "GET", "/jobs", "+Inf"] == 2
    assert found[f"{latency}_sum", "GET", "/jobs"] > 0


def test_a_request_that_waits_for_a_job_says_nothing_of_the_latency(operator: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session)
    operator.get(f"/jobs/{job.id}", headers={"Prefer": "wait=1"})
    found = values(operator)
    assert found["renalq_stack_http_requests_total", "GET", "/jobs/<id:job_id>", "200"] == 1
    assert "/jobs/<id:job_id>" not in str([name for name in found if "duration" in name[0]])


def test_processes_add_up_and_lose_nothing_while_postgres_is_away(
    app: Flask, operator: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, another, kind = RequestCounts(sessions), RequestCounts(sessions), RequestKind("GET", "/jobs", 200, 3)
    for counts in (one, one, another):
        assert not counts.add(kind, 0.04)
    with monkeypatch.context() as patch:
        broken = app.extensions["renalq"].sessions
        patch.setattr(one, "_sessions", type(broken)(bind=None, expire_on_commit=False))
        one.flush()
    for counts in (one, another):
        counts.flush()
    assert values(operator)["renalq_stack_http_requests_total", "GET", "/jobs", "200"] == 3


def test_counts_are_added_while_requests_come(operator: FlaskClient, app: Flask, sessions: Sessions) -> None:
    app.extensions["renalq"].requests._flush_at = 0.0
    operator.get("/jobs").close()
    with sessions.begin() as session:
        assert [row.route for row in monitoring.request_totals(session)] == ["/jobs"]


# --- cost ---

MANY = """
INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)
    SELECT gen_random_uuid(), 'tenant-' || n % 3, 'predict', 'urgent', 'queued', '{}', '{}', 1
    FROM generate_series(1, 20000) AS n;
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, kind)
    SELECT gen_random_uuid(), tenant_id, id, 0, lane, 'queued', kind FROM jobs;
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, started_at, finished_at)
    SELECT gen_random_uuid(), tenant_id, id, 1, lane, 'succeeded', now() - interval '1 day', now() - interval '1 day'
    FROM jobs;
INSERT INTO tenant_loads (tenant_id, scans) SELECT tenant_id, count(*) FROM jobs GROUP BY tenant_id
"""


@pytest.mark.parametrize(
    ("read", "most"),
    [
        (monitoring.oldest_ages, 100),
        (monitoring.unit_times, 100),
        (monitoring.scans_per_second, 100),
        (monitoring.scans_in_queue, 100),
        (monitoring.unfinished_units, monitoring.MOST_UNITS),
        (lambda session: monitoring.scan_totals(session, None, []), 100),
        (lambda session: monitoring.scan_totals(session, "tenant-1", []), 100),
    ],
    ids=["oldest", "times", "rate", "queue", "units", "scans", "scans-of-tenant"],
)
def test_no_figure_reads_the_whole_queue(sessions: Sessions, read: Any, most: int) -> None:
    with sessions.begin() as session:
        session.execute(text(MANY))
        assert most_rows(session, read) <= most


def test_the_oldest_unit_is_found_by_lane(operator: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        for tenant in ("a", "b"):
            job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2, chunk=1, tenant_id=tenant)
            age = {"a": 100, "b": 300}[tenant]
            session.execute(
                text("UPDATE units SET not_before = now() - make_interval(secs => :age) WHERE job_id = :job"),
                {"age": age, "job": job.id},
            )
    found = values(operator)
    assert 300 <= found["renalq_stack_oldest_unit_seconds", "batch"] < 310
    assert found["renalq_stack_oldest_unit_seconds", "urgent"] == 0
    assert found["renalq_stack_units", "batch", "waiting"] == 4
