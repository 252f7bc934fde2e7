"""Retention of jobs, feedback and scans: what goes, what is kept by something else, and what readers get meanwhile."""

import datetime as dt
import random
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import InstrumentedAttribute

from jobs.db import Base, Sessions
from jobs.errors import JobNotFound
from jobs.models import feedback as feedback_model
from jobs.queue import lifecycle, submission
from jobs.results import queries, scan_registry
from jobs.retention import feedback, jobs, results, scans
from jobs.retention.scans import ScanSweep
from jobs.settings import Settings
from jobs.states import JobKind, JobState, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Artifact, Checkpoint, Dataset, Job, JobEvent, Scan, ScanResult, Truth, Unit
from tests import builders

SOON = 1e-9
"""Retention time (days) that every ended job has passed."""
DAYS = 0.5
"""Retention time (days) that what was moved back by a day has passed."""
GO_WITH_THEIR_JOB = (Unit, ScanResult, JobEvent, Artifact, Checkpoint)


def ended(sessions: Sessions, scans: int = 3, failed: int = 0, **new: object) -> uuid.UUID:
    """A prediction that ended."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=scans, chunk=1, **new)
        for unit in builders.units_of(session, job):
            held = builders.claim(session, unit)
            lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed))
        return job.id


def delete_jobs(sessions: Sessions, days: float = SOON, rows: int = jobs.ROWS) -> None:
    """All that may go, results first."""
    for batch in (results.expire, jobs.delete_jobs):
        more = True
        while more:
            with sessions.begin() as session:
                more = batch(session, days, rows)


def exist(sessions: Sessions, *job_ids: uuid.UUID) -> list[bool]:
    with sessions() as session:
        return [session.get(Job, job_id) is not None for job_id in job_ids]


def age(sessions: Sessions, column: InstrumentedAttribute[dt.datetime], *ids: uuid.UUID) -> None:
    """Move the rows' times back by a day. (Their ids stay: a search allows for clocks that are wrong by as much.)"""
    with sessions.begin() as session:
        table = column.class_
        session.execute(update(table).where(table.id.in_(ids)).values({column.key: column - dt.timedelta(days=1)}))


def test_an_old_job_goes_with_all_its_rows(sessions: Sessions) -> None:
    gone = ended(sessions, failed=1)
    with sessions.begin() as session:
        training = builders.make_job(session, state=JobState.FAILED).id
        blob = {"sha256": "a" * 64, "size": 1, "tenant_id": builders.TENANT, "job_id": training}
        session.add_all(
            (Artifact(name="log.txt", media_type="text/plain", **blob), Checkpoint(fence=1, epoch=1, path="", **blob))
        )
        running = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.RUNNING, scans=2).id
    delete_jobs(sessions, days=1)
    assert exist(sessions, gone, training, running) == [True, True, True]
    delete_jobs(sessions)
    assert exist(sessions, gone, training, running) == [False, False, True]
    with sessions() as session:
        left = {table.__tablename__: set(session.scalars(select(table.job_id))) for table in GO_WITH_THEIR_JOB}
    assert left == {name: {running} if name in ("units", "scan_results", "job_events") else set() for name in left}


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_batches_are_bounded(sessions: Sessions, rows: int) -> None:
    for _ in range(2):
        ended(sessions)
    for batch in (results.expire, jobs.delete_jobs):
        more = True
        while more:
            before = counts(sessions)
            with sessions.begin() as session:
                more = batch(session, SOON, rows)
            assert sum(max(0, one - other) for one, other in zip(before, counts(sessions), strict=True)) <= rows
    assert counts(sessions) == [0, 0, 0]


def counts(sessions: Sessions) -> list[int]:
    with sessions() as session:
        return [session.scalar(select(func.count()).select_from(table)) or 0 for table in (Unit, ScanResult, JobEvent)]


def test_a_job_stays_while_something_refers_to_it(sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained = builders.make_model(session).job_id
        dataset = builders.make_dataset(session)
        checked = dataset.job_id = builders.make_job(
            session, JobKind.INGEST, JobState.SUCCEEDED, dataset_id=dataset.id
        ).id
        failed = builders.make_job(session, state=JobState.FAILED).id
        retried = submission.retry(session, builders.TENANT, failed).id
        reproduced = builders.make_job(session, state=JobState.FAILED).id
        reproduction = builders.make_job(session, state=JobState.FAILED, reproduction_of=reproduced).id
    for _ in range(2):  # first the reproduction, then the job that it reproduced
        delete_jobs(sessions)
    assert exist(sessions, trained, checked, failed, retried, reproduced, reproduction) == [True] * 4 + [False] * 2
    with sessions() as session:
        assert len(queries.events(session, failed).data) > 1, "what stays, stays whole"
    with sessions.begin() as session:
        lifecycle.cancel(session, builders.TENANT, retried)
        session.execute(delete(Dataset))
    for _ in range(2):
        delete_jobs(sessions)
    assert exist(sessions, trained, checked, failed, retried) == [True, False, False, False]


def test_every_reference_to_a_job_goes_with_it_or_keeps_it_or_can_do_without() -> None:
    keep = {str(column.property.columns[0]) for column in jobs.REFERRERS}
    kept = {
        str(key.parent)
        for table in Base.metadata.tables.values()
        for key in table.foreign_keys
        if key.target_fullname == "jobs.id" and key.ondelete != "CASCADE"
    }
    assert kept - keep == {"truths.job_id", "model_evaluations.job_id"}, "they copy what they need of the job"
    assert keep - kept == {"datasets.job_id"}


@pytest.mark.parametrize("table", ["jobs", "units", "scans"])
def test_every_reference_to_what_is_deleted_has_an_index(table: str) -> None:
    """Otherwise Postgres reads the whole referring table for each deleted row."""
    without = {
        str(key.parent)
        for referring in Base.metadata.tables.values()
        for key in referring.foreign_keys
        if key.column.table.name == table and not _leads_an_index(key.parent)
    }
    assert without == set()


def _leads_an_index(column) -> bool:  # type: ignore[no-untyped-def]
    table = column.table
    whole = [
        index
        for index in table.indexes
        if (where := index.dialect_options["postgresql"]["where"]) is None or str(where) == f"{column.name} IS NOT NULL"
    ]
    firsts = [next(iter(index.columns), None) for index in (*whole, table.primary_key)]
    return column.unique or any(first is column for first in firsts)


@pytest.mark.parametrize(("room", "index"), [(results, "ix_jobs_unexpired"), (jobs, "ix_jobs_deletable")])
def test_old_jobs_are_found_by_an_index(sessions: Sessions, room: ModuleType, index: str) -> None:
    query = room.oldest(30).compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
    with sessions() as session:
        for other in ("seqscan", "bitmapscan", "sort"):
            session.execute(text(f"SET LOCAL enable_{other} = off"))
        assert f"Scan using {index} on jobs" in "\n".join(session.scalars(text(f"EXPLAIN {query}")))


def test_events_read_during_a_deletion_are_not_half_an_answer(sessions: Sessions) -> None:
    job_id = ended(sessions, scans=1)
    with sessions() as session:
        last = queries.events(session, job_id).data[-1].id
    with sessions.begin() as session:
        results.expire(session, SOON)
    with sessions.begin() as session:
        jobs.delete_jobs(session, SOON, rows=2)  # the unit, and the first event
    with sessions() as session:
        assert session.get(Job, job_id) is not None
        for read in (lambda: queries.events(session, job_id), lambda: queries.events(session, job_id, after=last)):
            with pytest.raises(JobNotFound):
                read()
    delete_jobs(sessions)
    with sessions() as session:
        for read in (queries.events, queries.epochs, queries.artifacts):
            with pytest.raises(JobNotFound):
                read(session, job_id)  # the job was found before it was deleted


def test_feedback_outlives_its_job_and_ends_on_its_own(sessions: Sessions) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session)
    job_id = ended(sessions, scans=2, model_id=model.id)
    with sessions.begin() as session:
        view = queries.job(session, builders.TENANT, job_id)
        ids = [
            feedback_model.record(session, view, row.scan_id, "Tumor").id for row in queries.results(session, view).data
        ]
    delete_jobs(sessions)
    with sessions.begin() as session:
        assert [row.job_id for row in session.scalars(select(Truth))] == [None, None]
        assert feedback.delete_feedback(session, days=DAYS) is False
    age(sessions, Truth.at, ids[0])
    with sessions.begin() as session:
        assert feedback.delete_feedback(session, days=DAYS, rows=1) is True
        assert session.scalars(select(Truth.id)).all() == ids[1:]


# --- scans ---


def sweep(sessions: Sessions, settings: Settings, days: float = DAYS) -> int:
    """A round; returns its steps."""
    one_round, steps = ScanSweep(), 1
    while one_round.step(sessions, BlobStore(settings.artifacts), settings.model_copy(update={"scan_days": days})):
        steps += 1
    return steps


def test_scans_stay_while_a_result_or_feedback_needs_them(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session)
        new, old = builders.make_scan(session).id, builders.make_scan(session).id
    job_id = ended(sessions, scans=3, model_id=model.id)
    with sessions.begin() as session:
        view = queries.job(session, builders.TENANT, job_id)
        predicted = [row.scan_id for row in queries.results(session, view).data]
        feedback_model.record(session, view, predicted[0], "Tumor")
    age(sessions, Scan.created_at, old, *predicted)
    sweep(sessions, settings, days=0)
    assert stored(sessions) == {new, old, *predicted}
    sweep(sessions, settings)
    assert stored(sessions) == {new, *predicted}
    delete_jobs(sessions)
    sweep(sessions, settings)
    assert stored(sessions) == {new, predicted[0]}


def stored(sessions: Sessions) -> set[uuid.UUID]:
    with sessions() as session:
        return set(session.scalars(select(Scan.id)))


@pytest.mark.parametrize("verb", ["register", "known", "by_hash"])
def test_scan_that_is_sent_again_is_kept(sessions: Sessions, settings: Settings, verb: str) -> None:
    """Its id is about to be used: a job with it is submitted in another transaction."""
    with sessions.begin() as session:
        scan, other = builders.make_scan(session), builders.make_scan(session)
    age(sessions, Scan.created_at, scan.id, other.id)
    with sessions.begin() as session:
        match verb:
            case "register":
                row = {name: getattr(scan, name) for name in ("tenant_id", "sha256", "size", "media_type")}
                scan_registry.register(session, [{**row, "id": builders.unknown_id()}])
            case "known":
                assert scan_registry.known(session, builders.TENANT, [scan.id]) == {scan.id}
            case "by_hash":
                assert scan_registry.by_hash(session, builders.TENANT, [scan.sha256]) == {scan.sha256: scan.id}
    sweep(sessions, settings)
    assert stored(sessions) == {scan.id}


def test_scan_that_a_transaction_is_about_to_use_is_kept(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as session:
        scan_id = builders.make_scan(session).id
    age(sessions, Scan.created_at, scan_id)
    with sessions.begin() as other:
        scan_registry.known(other, builders.TENANT, [scan_id])
        sweep(sessions, settings)
    assert stored(sessions) == {scan_id}


def test_a_round_passes_what_is_kept_once(
    sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "ROWS", 2)
    ended(sessions, scans=5)
    with sessions.begin() as session:
        last = builders.make_scan(session).id
    age(sessions, Scan.created_at, *stored(sessions))
    assert sweep(sessions, settings) == 4
    assert last not in stored(sessions)


def test_scans_are_used_while_others_are_deleted(sessions: Sessions, settings: Settings) -> None:
    """Threads send old scans again, and submit jobs with them in transactions of their own. A scan that is gone is an
    IntegrityError then, and locks taken in different orders are a deadlock."""
    with sessions.begin() as session:
        ids = [builders.make_scan(session).id for _ in range(120)]
    age(sessions, Scan.created_at, *ids)
    stop = threading.Event()

    def use(seed: int) -> None:
        for start in range(0, 120, 10):
            wanted = random.Random(seed + start).sample(ids, 10)
            with sessions.begin() as session:
                known = scan_registry.known(session, builders.TENANT, wanted)
            with sessions.begin() as session:
                new = submission.NewJob(builders.TENANT, JobKind.PREDICT_BATCH, Lane.BATCH)
                submission.submit(session, new, [submission.NewResult(scan_id) for scan_id in known])

    def delete() -> None:
        while not stop.is_set():
            with sessions.begin() as session:
                scans.delete_unneeded(session, random.sample(ids, 5), DAYS)

    with ThreadPoolExecutor() as pool:
        deleting, using = pool.submit(delete), [pool.submit(use, seed) for seed in range(3)]
        errors = [one.exception() for one in using]
        stop.set()
        assert [*errors, deleting.exception()] == [None] * 4
    with sessions() as session:
        used = set(session.scalars(select(ScanResult.scan_id)))
    assert used <= stored(sessions) < set(ids)
