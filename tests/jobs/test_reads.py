"""What a page or a scrape reads does not grow with a tenant's history, nor with the queues of others."""

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import text

from jobs.db import Sessions
from jobs.queue import position
from jobs.results import queries
from jobs.results.job_filter import JobFilter
from jobs.states import JobKind, JobState
from jobs.tables import new_id
from tests import builders
from tests.builders import TENANT
from tests.plans import most_rows

HISTORY = 3000
FINISHED = """
INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, stages, total, succeeded, created_at, finished_at)
SELECT id, :tenant, 'predict', 'urgent', 'succeeded', '{}', '{}', '[]', 1, 1, now() - '1 year'::interval, now()
FROM unnest(CAST(:ids AS uuid[])) AS id
"""
WAITING = """
WITH theirs AS (
    INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, stages, total)
    SELECT id, 'elsewhere', 'predict', 'urgent', 'queued', '{}', '{}', '[]', 1
    FROM unnest(CAST(:ids AS uuid[])) AS id RETURNING id, tenant_id
)
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state)
SELECT id, tenant_id, id, 0, 'urgent', 'queued' FROM theirs
"""


@pytest.fixture
def history(sessions: Sessions) -> None:
    """A year of predictions and some other jobs of one tenant; then many jobs of another."""
    year = dt.timedelta(days=365).total_seconds() * 1000
    ids = [str(new_id()) for _ in range(HISTORY)]
    old = [f"{int(i.replace('-', '')[:12], 16) - int(year):012x}{i.replace('-', '')[12:]}" for i in ids]
    with sessions.begin() as session:
        session.execute(text(FINISHED), {"tenant": TENANT, "ids": old})
        builders.make_job(session, JobKind.PREDICT, JobState.FAILED, scans=1)
        builders.make_job(session, JobKind.TRAIN, JobState.SUCCEEDED)
        builders.make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=1)
        session.execute(text(WAITING), {"ids": [str(new_id()) for _ in range(HISTORY)]})


HOUR_AGO = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)


@pytest.mark.usefixtures("history")
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"state": "failed"},
        {"state": "queued"},
        {"state": "succeeded"},
        {"kind": "train"},
        {"kind": "predict"},
        {"pipeline": "tabular"},
        {"created_after": HOUR_AGO},
        {"metadata": {"study": "7"}},
    ],
)
def test_a_page_reads_what_it_shows(sessions: Sessions, wanted: dict[str, Any]) -> None:
    with sessions() as session:
        assert most_rows(session, lambda now: queries.jobs(now, TENANT, JobFilter(**wanted), 5, None)) <= 10


@pytest.mark.usefixtures("history")
def test_a_scrape_reads_no_units_of_other_tenants(sessions: Sessions) -> None:
    with sessions() as session:
        assert most_rows(session, lambda now: position.unfinished_units(now, TENANT)) <= 10
        assert position.unfinished_units(session, TENANT)["queued"] == 3
        assert most_rows(session, lambda now: position.unfinished_jobs(now, TENANT)) <= 10
