"""A job's place in the fair order of its lane, when it may end, and that a long queue costs a look no more."""

import uuid

import pytest
from flask.testing import FlaskClient
from sqlalchemy import TextClause, event, func, select, text, update

from jobs.db import Sessions
from jobs.queue import lifecycle, processes
from jobs.queue.pace import chunk_size, latest_units
from jobs.queue.position import MAX_POSITION, POSITIONS
from jobs.queue.processes import Heartbeat
from jobs.results import queries
from jobs.results.job_filter import JobFilter
from jobs.results.queries import JobView
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.tables import Job, Unit
from tests import builders

FILL = """
INSERT INTO jobs (id, tenant_id, kind, lane, state, params, metadata, total)
    SELECT (lpad(to_hex(:first + n), 12, '0') || '70008000000000000000')::uuid, :tenant, 'predict', 'urgent', 'queued',
           '{}', '{}', 1
    FROM generate_series(1, :number) AS n;
INSERT INTO units (id, tenant_id, job_id, ordinal, lane, state)
    SELECT gen_random_uuid(), tenant_id, id, 0, lane, 'queued' FROM jobs WHERE tenant_id = :tenant;
INSERT INTO tenant_loads (tenant_id, scans) VALUES (:tenant, :number)
"""


def fill(sessions: Sessions, tenant: str, number: int, first: int = 0) -> None:
    """So many single scans of a tenant that wait, in the order of their numbers, older than whatever is made today."""
    with sessions.begin() as session:
        session.execute(text(FILL), {"tenant": tenant, "number": number, "first": first})


def view(sessions: Sessions, job_id: uuid.UUID, tenant: str = builders.TENANT) -> JobView:
    with sessions.begin() as session:
        return queries.job(session, tenant, job_id)


def position(sessions: Sessions, job: Job) -> int | None:
    return view(sessions, job.id, job.tenant_id).queue_position


def queue(sessions: Sessions, *tenants: str, kind: JobKind = JobKind.TRAIN, scans: int = 0) -> list[Job]:
    """A job for each name, in this order."""
    with sessions.begin() as session:
        return [builders.make_job(session, kind, scans=scans, tenant_id=tenant) for tenant in tenants]


def serve(sessions: Sessions, lane: str, workers: int = 1) -> None:
    with sessions.begin() as session:
        for number in range(workers):
            processes.upsert(session, Heartbeat(f"worker-{number}", processes.WORKER, [lane]))


def history(sessions: Sessions, kind: JobKind, scans: int, seconds: float) -> None:
    """A unit of the lane that has succeeded, and took so long."""
    with sessions.begin() as session:
        job = builders.make_job(session, kind, scans=scans)
        held = builders.claim(session, builders.units_of(session, job)[0])
        begun = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        session.execute(update(Unit).where(Unit.id == held.unit_id).values(started_at=begun))
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))


# --- the place ---


def test_own_jobs_wait_in_the_order_in_which_they_came(sessions: Sessions) -> None:
    jobs = queue(sessions, "a", "a", "a")
    assert [position(sessions, job) for job in jobs] == [0, 1, 2]


def test_tenants_take_turns(sessions: Sessions) -> None:
    jobs = queue(sessions, "a", "a", "a", "b", "b", "c")
    assert [position(sessions, job) for job in jobs] == [0, 3, 5, 1, 4, 2]


def test_the_places_of_all_are_one_order(sessions: Sessions) -> None:
    jobs = queue(sessions, *"aabacbbcaabdcad")
    assert sorted(position(sessions, job) or 0 for job in jobs) == list(range(len(jobs)))


def test_another_lane_does_not_count(sessions: Sessions) -> None:
    queue(sessions, "a", "b")
    (scan,) = queue(sessions, "a", kind=JobKind.PREDICT, scans=1)
    assert position(sessions, scan) == 0


def test_what_runs_has_no_place_and_is_in_nobodys(sessions: Sessions) -> None:
    first, second = queue(sessions, "a", "a")
    with sessions.begin() as session:
        builders.claim(session, builders.units_of(session, first)[0])
    assert [position(sessions, job) for job in (first, second)] == [None, 0]


def test_what_has_ended_is_out_of_the_queue(sessions: Sessions) -> None:
    first, second, third = queue(sessions, "a", "a", "b")
    with sessions.begin() as session:
        lifecycle.cancel(session, "a", first.id)
    assert [position(sessions, job) for job in (second, third)] == [0, 1]


def test_a_list_says_the_same_places(sessions: Sessions, client: FlaskClient) -> None:
    jobs = queue(sessions, "default", "b", "default", "b", "b", "default")
    listed = {job["id"]: job["queue_position"] for job in client.get("/jobs").get_json()["data"]}
    mine = [job for job in jobs if job.tenant_id == "default"]
    assert listed == {str(job.id): position(sessions, job) for job in mine}
    assert sorted(listed.values()) == [0, 2, 5]


# --- a long queue ---


def test_places_are_right_up_to_a_thousand_and_then_end(sessions: Sessions) -> None:
    fill(sessions, "default", 1500)
    with sessions.begin() as session:
        ids = session.scalars(select(Job.id).order_by(Job.id)).all()
    places = [view(sessions, ids[n]).queue_position for n in (0, 1, 998, 999, 1000, 1499)]
    assert places == [0, 1, 998, 999, MAX_POSITION, MAX_POSITION]
    fill(sessions, "elsewhere", 1500, first=10_000)
    places = [view(sessions, ids[n]).queue_position for n in (0, 1, 400, 499, 500, 900)]
    assert places == [0, 2, 800, 998, MAX_POSITION, MAX_POSITION]
    assert view(sessions, ids[1499]).eta_seconds is None


def test_twenty_thousand_waiting_jobs_are_not_read(sessions: Sessions) -> None:
    for tenant in range(4):
        fill(sessions, f"tenant-{tenant}", 5000, first=tenant * 10_000)
    with sessions.begin() as session:
        last = queue(sessions, "default", kind=JobKind.PREDICT, scans=1)[0]
        session.execute(text("ANALYZE"))
        theirs = select(Job.id).where(Job.tenant_id == "tenant-2").order_by(Job.id)
        middle, near = (session.scalars(theirs.offset(number)).first() for number in (2500, MAX_POSITION - 10))
    assert position(sessions, last) == 4
    assert middle is not None
    assert near is not None
    assert view(sessions, middle, "tenant-2").queue_position == MAX_POSITION
    for job_id in (last.id, middle, near):
        read = rows_read(sessions, job_id)
        assert set(read) == {"jobs", "tenant_loads"}
        assert read["jobs"] <= MAX_POSITION + 10


def test_the_pace_of_a_lane_is_read_from_its_end_alone(sessions: Sessions) -> None:
    fill(sessions, "default", 5000)
    serve(sessions, "urgent")
    with sessions.begin() as session:
        now = func.clock_timestamp()
        session.execute(update(Unit).values(state="running", started_at=now, lease_expires_at=now))
        session.execute(update(Unit).values(state="succeeded", lease_expires_at=None, finished_at=now))
        session.execute(text("ANALYZE"))
        statement = latest_units("urgent").compile(session.connection(), compile_kwargs={"literal_binds": True})
        plan = "\n".join(session.scalars(text(f"EXPLAIN {statement}")))
    assert "ix_units_succeeded" in plan
    assert "Seq Scan" not in plan
    assert "Sort" not in plan


def explained(job_id: uuid.UUID, how: str) -> TextClause:
    given = {**POSITIONS.compile().params, "ids": [job_id]}
    return text(f"EXPLAIN ({how}) {POSITIONS.text}").bindparams(**given)


def rows_read(sessions: Sessions, job_id: uuid.UUID) -> dict[str, int]:
    """What the question for a place reads, by table; no index may be passed by."""
    with sessions.begin() as session:
        plan = session.execute(explained(job_id, "ANALYZE, FORMAT JSON")).scalar_one()[0]["Plan"]
    read: dict[str, int] = {}
    waiting = [plan]
    while waiting:
        node = waiting.pop()
        waiting += node.get("Plans", ())
        if "Relation Name" in node:
            assert node["Node Type"] != "Seq Scan" or node["Relation Name"] == "tenant_loads", node
            rows = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            read[node["Relation Name"]] = read.get(node["Relation Name"], 0) + round(rows)
    return read


# --- the guess ---


def test_nothing_is_guessed_without_history_or_without_a_worker(sessions: Sessions) -> None:
    (job,) = queue(sessions, "default")
    serve(sessions, "train")
    assert view(sessions, job.id).eta_seconds is None
    with sessions.begin() as session:
        processes.deregister(session, "worker-0")
    history(sessions, JobKind.TRAIN, 0, seconds=60)
    assert view(sessions, job.id).eta_seconds is None
    serve(sessions, "batch")
    assert view(sessions, job.id).eta_seconds is None


def test_a_waiting_job_ends_after_those_before_it(sessions: Sessions) -> None:
    history(sessions, JobKind.TRAIN, 0, seconds=60)
    serve(sessions, "train")
    first, second, other = queue(sessions, "default", "default", "elsewhere")
    assert view(sessions, first.id).eta_seconds == pytest.approx(60, abs=2)
    assert view(sessions, second.id).eta_seconds == pytest.approx(180, abs=6)
    assert view(sessions, other.id, "elsewhere").eta_seconds == pytest.approx(120, abs=4)


def test_more_workers_end_it_sooner_but_none_shares_a_unit(sessions: Sessions) -> None:
    history(sessions, JobKind.TRAIN, 0, seconds=60)
    serve(sessions, "train", workers=2)
    first, _, third = queue(sessions, "default", "default", "default")
    assert view(sessions, first.id).eta_seconds == pytest.approx(60, abs=2)
    assert view(sessions, third.id).eta_seconds == pytest.approx(90, abs=3)


def test_scans_count_not_jobs(sessions: Sessions) -> None:
    history(sessions, JobKind.PREDICT_BATCH, scans=10, seconds=20)
    serve(sessions, "batch")
    large, small = [queue(sessions, "default", kind=JobKind.PREDICT_BATCH, scans=scans)[0] for scans in (40, 5)]
    assert view(sessions, large.id).eta_seconds == pytest.approx(80, abs=3)
    assert view(sessions, small.id).eta_seconds == pytest.approx(90, abs=3)
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, large)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    with sessions.begin() as session:  # half of what is left of the running one still comes before
        pace = view(sessions, small.id).eta_seconds
    assert view(sessions, small.id).queue_position == 0
    assert pace is not None
    assert 0 < pace < 60


def test_only_the_latest_twenty_units_make_the_pace(sessions: Sessions) -> None:
    history(sessions, JobKind.TRAIN, 0, seconds=6000)
    for _ in range(20):
        history(sessions, JobKind.TRAIN, 0, seconds=10)
    serve(sessions, "train")
    (job,) = queue(sessions, "default")
    assert view(sessions, job.id).eta_seconds == pytest.approx(10, abs=2)


def test_a_running_batch_goes_by_its_own_pace(sessions: Sessions) -> None:
    (job,) = queue(sessions, "default", kind=JobKind.PREDICT_BATCH, scans=40)
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, job)[0])
        begun = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, 30)
        session.execute(update(Job).where(Job.id == job.id).values(started_at=begun))
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    seen = view(sessions, job.id)
    assert (seen.job.state, seen.queue_position) == (JobState.RUNNING, None)
    assert seen.eta_seconds == pytest.approx(90, abs=3)  # ten scans in 30 s, thirty are left


def test_a_page_asks_as_often_as_a_single_job(sessions: Sessions) -> None:
    queue(sessions, *["default"] * 30)
    assert statements(sessions, 1) == statements(sessions, 30)


def statements(sessions: Sessions, limit: int) -> int:
    """How many statements a page takes."""
    asked: list[str] = []

    def note(connection, cursor, statement, *args) -> None:  # type: ignore[no-untyped-def]
        asked.append(statement)

    engine = sessions.kw["bind"]
    event.listen(engine, "before_cursor_execute", note)
    try:
        with sessions.begin() as session:
            found = queries.jobs(session, builders.TENANT, JobFilter(), limit, None)
            assert len(found.data) == limit
    finally:
        event.remove(engine, "before_cursor_execute", note)
    return len(asked)


# --- the size of a chunk ---


@pytest.mark.parametrize(
    ("scans", "seconds", "expected"),
    [(10, 1, 100), (10, 0.001, 2048), (10, 60, 16)],
    ids=["ten seconds of work", "never too many to write at once", "never fewer than a device takes at once"],
)
def test_a_chunk_is_ten_seconds_of_work_by_the_lanes_pace(
    sessions: Sessions, scans: int, seconds: float, expected: int
) -> None:
    with sessions.begin() as session:
        assert chunk_size(session, "batch", Settings()) == Settings().chunk_scans
    history(sessions, JobKind.PREDICT_BATCH, scans=scans, seconds=seconds)
    with sessions.begin() as session:
        assert chunk_size(session, "batch", Settings()) == pytest.approx(expected, rel=0.05)
        assert chunk_size(session, "urgent", Settings()) == Settings().chunk_scans


# --- jobs that run ---


def started(sessions: Sessions, scans: int = 100, chunk: int = 10) -> tuple[Job, list[Unit]]:
    """A batch of chunks."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=scans, chunk=chunk)
        return job, builders.units_of(session, job)


def begun(seconds: float) -> object:
    return func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def run(sessions: Sessions, unit: Unit, seconds: float, warmup: float | None = None) -> None:
    """The unit has taken so long, of it the warm-up for loading a network."""
    with sessions.begin() as session:
        held = builders.claim(session, unit)
        session.execute(update(Unit).where(Unit.id == unit.id).values(started_at=begun(seconds)))
        session.execute(update(Job).where(Job.id == unit.job_id).values(started_at=begun(seconds)))
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held), warmup_seconds=warmup)


def test_a_cold_start_does_not_count_for_the_chunks_to_come(sessions: Sessions) -> None:
    job, units = started(sessions)
    run(sessions, units[0], seconds=30, warmup=25)
    assert view(sessions, job.id).eta_seconds == pytest.approx(90 * 0.5, rel=0.05)
    with sessions.begin() as session:
        assert chunk_size(session, "batch", Settings(chunk_seconds=10)) in (19, 20)


def test_the_check_of_a_dataset_tells_nothing_of_a_batch(sessions: Sessions) -> None:
    serve(sessions, "batch")
    history(sessions, JobKind.INGEST, 0, seconds=60)
    with sessions.begin() as session:
        assert chunk_size(session, "batch", Settings(chunk_scans=128)) == 128
    job, _ = started(sessions)
    assert view(sessions, job.id).eta_seconds is None


def test_a_chunk_that_runs_moves_progress_and_eta(sessions: Sessions) -> None:
    job, units = started(sessions, scans=20, chunk=20)
    with sessions.begin() as session:
        held = builders.claim(session, units[0])
        session.execute(update(Unit).values(started_at=begun(14)))
        session.execute(update(Job).values(started_at=begun(14)))
        assert queries.job(session, builders.TENANT, job.id).eta_seconds is None
        lifecycle.report(session, held, done=5, warmup_seconds=4)
    seen = view(sessions, job.id)
    assert (seen.progress, seen.eta_seconds) == (0.25, pytest.approx(15 * 2, rel=0.05))
    with sessions.begin() as session:
        lifecycle.requeue(session, held, "DRAINED")
        again = builders.claim(session, units[0])
        assert again.attempt == 2
    assert view(sessions, job.id).progress == 0, "what was lost is to be done again"


def test_before_its_first_scan_a_batch_goes_by_the_pace_of_its_lane(sessions: Sessions) -> None:
    serve(sessions, "batch")
    history(sessions, JobKind.PREDICT_BATCH, 10, seconds=5)
    job, units = started(sessions)
    with sessions.begin() as session:
        for unit in units[:2]:
            builders.claim(session, unit)
    assert view(sessions, job.id).eta_seconds == pytest.approx(25, rel=0.05), "two workers halve it"


def test_a_job_that_runs_is_never_done(sessions: Sessions) -> None:
    """Its scans may all have results, while the last unit ends or explanations are made."""
    job, units = started(sessions, scans=10)
    with sessions.begin() as session:
        held = builders.claim(session, units[0])
        lifecycle.report(session, held, done=10)
    assert view(sessions, job.id).progress == 0.999


def test_a_training_ends_when_its_worker_says(sessions: Sessions) -> None:
    (job,) = queue(sessions, "default")
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.report(session, held, progress=0.5, seconds_left=40)
    assert view(sessions, job.id).eta_seconds == pytest.approx(40, abs=2)
    with sessions.begin() as session:
        lifecycle.report(session, held, progress=0.3, seconds_left=0)
    seen = view(sessions, job.id)
    assert (seen.eta_seconds, seen.progress) == (0, 0.5), "progress never falls"
    with sessions.begin() as session:
        lifecycle.requeue(session, held, "DRAINED")
        builders.claim(session, builders.units_of(session, job)[0])
    seen = view(sessions, job.id)
    assert seen.eta_seconds is not None
    assert seen.eta_seconds >= 0
