"""Statements that run for every unit find their rows by key, also if they were planned while the queue was empty."""

from statistics import median

from sqlalchemy import text

from jobs.db import Sessions
from jobs.queue import dispatch, leases, lifecycle
from jobs.states import JobKind, Lane
from tests.builders import TENANT, claim, make_job, outcomes_of, units_of
from tests.plans import pages_read

ENDED = """
INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total, finished_at)
    SELECT gen_random_uuid(), 't', 'predict', 'urgent', 'cancelled', '{}', '{}', 1, now() FROM generate_series(1, 5000);
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state, finished_at)
    SELECT gen_random_uuid(), tenant_id, id, 0, lane, state, finished_at FROM jobs
"""
PREPARED = "SELECT name, cardinality(parameter_types) AS parameters FROM pg_prepared_statements"
BY_KEY = ("claim_unit", "claim_next", "poll_unit", "succeed_unit", "finish_job", "cancel_units", "dispatch", "reserve")
OF_THE_QUEUE = ("ix_jobs_unfinished", "ix_jobs_not_succeeded", "ix_units_claimable")
"""Indexes that are small when the queue is empty, and large when it is full."""


def test_no_statement_walks_an_index_of_the_whole_queue(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.execute(text(ENDED))
        session.execute(text("ANALYZE jobs, units"))
        job = make_job(session, JobKind.PREDICT_BATCH, scans=4, chunk=1)
        first, *others = units_of(session, job)
        held = claim(session, first)
        leases.beat(session, held, 45)
        lifecycle.succeed(session, held, outcomes=outcomes_of(session, held))
        dispatch.dispatch(session, [others[0].id], 15)
        dispatch.reserve(session, [others[1].id])
        leases.claim_next(session, Lane.BATCH, "worker", 45)
        lifecycle.cancel(session, TENANT, job.id)
        session.execute(text("SET LOCAL plan_cache_mode = force_generic_plan"))
        parameters = {row.name: ["NULL"] * row.parameters for row in session.execute(text(PREPARED))}
        for name in BY_KEY:
            explain = text(f"EXPLAIN EXECUTE {name}({', '.join(parameters[name])})")
            plan = "\n".join(session.scalars(explain).all())
            assert not [index for index in OF_THE_QUEUE if index in plan], f"{name}: {plan}"
            assert "Seq Scan on jobs" not in plan, name
            assert "Seq Scan on units" not in plan, name


def test_the_end_of_a_unit_does_not_step_over_those_that_ended_while_a_transaction_is_open(sessions: Sessions) -> None:
    """A backup keeps the index entries of all units that end meanwhile."""
    pages: list[int] = []
    with sessions.begin() as session:
        units = units_of(session, make_job(session, JobKind.PREDICT_BATCH, scans=200, chunk=1))
    # One connection, whose pages are counted: a session may take another one of the pool after each commit.
    with sessions() as backup, sessions.kw["bind"].connect() as own, sessions(bind=own) as worker:
        backup.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        backup.execute(text("SELECT count(*) FROM units"))
        for unit in units:
            held = claim(worker, unit)
            outcomes = outcomes_of(worker, held)
            before = pages_read(worker)
            lifecycle.succeed(worker, held, outcomes=outcomes)
            pages.append(pages_read(worker) - before)
    assert median(pages[-21:-1]) <= 2 * median(pages[10:30]), pages
