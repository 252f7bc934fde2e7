"""What is written all the time is cheap: updates within a page that touch no index (HOT), and no write that says
nothing."""

import threading

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from jobs.db import Base, Sessions
from jobs.queue import leases, lifecycle
from jobs.queue.submission import NewJob, submit
from jobs.states import JobKind, Lane
from jobs.tables import Job, JobEvent
from tests.builders import TENANT, claim, make_job, units_of

UPDATES = text("""
SELECT coalesce(sum(n_tup_upd), 0)::int, coalesce(sum(n_tup_hot_upd), 0)::int
FROM pg_stat_xact_user_tables WHERE relname IN ('jobs', 'units')
""")


def test_heartbeats_and_progress_touch_no_index(sessions: Sessions) -> None:
    with sessions.begin() as session:
        jobs = [make_job(session) for _ in range(20)]
        held = [claim(session, units_of(session, job)[0]) for job in jobs]
    for number in range(1, 10):
        for claimed in held:
            with sessions.begin() as session:
                before = session.execute(UPDATES).one()
                leases.beat(session, claimed, 45)
                lifecycle.report(session, claimed, progress=number / 10)
                updates, touching_no_index = session.execute(UPDATES).one()
                assert (updates - before[0], touching_no_index - before[1]) == (3, 3)


def test_claims_of_a_running_job_leave_its_row_alone(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session, JobKind.PREDICT_BATCH, scans=40, chunk=10)
        first, *others = units_of(session, job)
        held = claim(session, first)
        session.refresh(job)
        assert (job.state, job.attempt) == ("running", 1)
        revision = job.revision
        for unit in others:
            claim(session, unit)
        session.refresh(job)
        assert job.revision == revision
        assert _claimed(session, job) == [1]
        lifecycle.requeue(session, held, "DRAINED")
        claim(session, first)
        session.refresh(job)
        assert (job.attempt, _claimed(session, job)) == (2, [1, 2])


def _claimed(session: Session, job: Job) -> list[int]:
    """The attempts of the job's events `claimed`."""
    claims = select(JobEvent.data["attempt"].as_integer()).where(JobEvent.job_id == job.id, JobEvent.type == "claimed")
    return list(session.scalars(claims.order_by(JobEvent.id)))


def test_report_of_nothing_waits_for_no_lock_of_the_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = make_job(session)
        held = claim(session, units_of(session, job)[0])
        session.execute(text("UPDATE units SET progress_at = progress_at - interval '1000 seconds'"))
    reported = threading.Event()

    def report() -> None:
        with sessions.begin() as session:
            lifecycle.report(session, held)
        reported.set()

    with sessions.begin() as session:
        leases.lock_job(session, job.id)
        thread = threading.Thread(target=report)
        thread.start()
        assert reported.wait(10)
    thread.join()
    with sessions() as session:
        fresh = text("SELECT progress_at > clock_timestamp() - interval '60 s' FROM units")
        assert session.scalar(fresh)


def test_the_storage_of_each_table_is_as_declared(sessions: Sessions) -> None:
    options = {name: table.dialect_options["postgresql"]["with"] or {} for name, table in Base.metadata.tables.items()}
    declared = {name: {f"{option}={value}" for option, value in of.items()} for name, of in options.items() if of}
    with sessions() as session:
        query = "SELECT relname, reloptions FROM pg_class WHERE relkind = 'r' AND reloptions IS NOT NULL"
        stored = {row.relname: set(row.reloptions) for row in session.execute(text(query))}
    assert {name: stored[name] for name in stored if name in options} == declared


def test_labels_are_found_at_once_after_a_submission(sessions: Sessions) -> None:
    """Their index keeps no list of entries to be added later, which every search would read."""
    with sessions.begin() as session:
        submit(session, NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, metadata={"study": "7"}))
        options = session.scalar(text("SELECT reloptions FROM pg_class WHERE relname = 'ix_jobs_metadata'"))
    assert options == ["fastupdate=off"]
