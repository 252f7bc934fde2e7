"""Every verb against every other, on the same rows: whatever stands between the statements of one, the other neither
deadlocks with it nor leaves the database inconsistent.

The first verb is stopped before each of its statements. The second one then runs until it has ended or waits for a
lock of the first, which goes on. If it needs a lock of the second now, Postgres finds the deadlock.
"""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg2.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import Connection, event, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.datasets import catalog
from jobs.db import NOW, make_engine
from jobs.deletions.of_jobs import delete_job
from jobs.errors import RenalQError
from jobs.events import deliveries, webhooks
from jobs.idempotency import KeyedRequest
from jobs.models import promotion
from jobs.models.deletion import delete_version
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import checkpoints, completion, dispatch, explanations, leases, lifecycle, reaping, submission
from jobs.queue.leases import Claim
from jobs.queue.lifecycle import RetryPolicy
from jobs.queue.submission import NewJob, NewResult
from jobs.results import scan_registry
from jobs.retention import checkpoints as retained_checkpoints
from jobs.retention import deletions, results
from jobs.retention import jobs as retention
from jobs.settings import Settings
from jobs.states import JobKind, JobState, Lane
from jobs.storage.blobs import Blob
from jobs.tables import Dataset, Delivery, IdempotencyKey, Job, Scan, ScanResult, Unit, new_id
from tests import builders
from tests.builders import BROKEN, SCORES, TENANT, TRANSIENT
from tests.databases import Database, Databases
from tests.depth import depth
from tests.jobs.checker import faults

RETRY = RetryPolicy(max_failures=3, base=60)
KEY = KeyedRequest(TENANT, "k" * 64, "f" * 64)
SHA = "e" * 64
EVERY = depth(3, 1)
"""Of its pairs with the others, each verb plays every so many."""


@dataclass(frozen=True)
class World:
    """Ids of what the verbs work on, all of one tenant.

    A large batch has units in all states in which a unit can wait or run; another one was cancelled. Their model was
    trained on a dataset, on which another training has failed. A third training runs. A prediction has ended;
    another one, a scan and a model version are being deleted.
    """

    dataset: uuid.UUID
    unchecked: uuid.UUID
    failed: uuid.UUID
    unchecked_by: uuid.UUID
    model: uuid.UUID
    batch: uuid.UUID
    units: list[uuid.UUID]
    held: Claim
    explaining: Claim
    training: Claim
    webhook: uuid.UUID
    delivery: uuid.UUID
    ended: uuid.UUID
    scan: uuid.UUID
    deleted: list[uuid.UUID]


def build(session: Session) -> World:
    """The world, made by verbs."""
    webhook = webhooks.create(session, TENANT, "https://receiver.example", list(webhooks.EventType)).id
    dataset = builders.make_dataset(session)
    dataset_id, model = dataset.id, builders.make_model(session, dataset=dataset).id
    builders.make_model(session, {"f1": 0.99}, dataset=builders.make_dataset(session))
    key = {"idempotency_key": KEY.key_sha256}
    failed = builders.make_job(session, state=JobState.FAILED, dataset_id=dataset_id, **key).id
    session.add(IdempotencyKey(**vars(KEY)))
    unchecked = builders.make_dataset(session, state="checking").id
    check = builders.make_job(session, JobKind.INGEST, JobState.FAILED, dataset_id=unchecked).id
    session.execute(update(Dataset).where(Dataset.id == unchecked).values(job_id=check))
    running = builders.make_job(session, dataset_id=builders.make_dataset(session).id)
    training = builders.claim(session, builders.units_of(session, running)[0])
    for epoch in (1, 2):
        checkpoints.save(session, training, _checkpoint(epoch))
    ended = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, scans=4, model_id=model).id
    scan = session.scalars(select(ScanResult.scan_id).where(ScanResult.job_id == ended).limit(1)).one()
    deleted = _delete_some(session, model, scan)
    batch, units, held, explaining = _batch(session, model)
    _age(session, builders.make_job(session, JobKind.PREDICT_BATCH, scans=6, chunk=2).id)
    delivery = session.scalars(select(Delivery.id).where(Delivery.webhook_id == webhook).limit(1)).one()
    jobs = dataset_id, unchecked, failed, check, model, batch
    return World(*jobs, units, held, explaining, training, webhook, delivery, ended, scan, deleted)


def _delete_some(session: Session, model: uuid.UUID, scan: uuid.UUID | None) -> list[uuid.UUID]:
    """A prediction that shares a scan with another, a scan with results, and a version: none of their rows has gone."""
    new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=model)
    job = submission.submit(session, new, [NewResult(scan), NewResult(builders.make_scan(session).id)])
    held = builders.claim(session, builders.units_of(session, job)[0])
    lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    other = builders.make_job(session, JobKind.PREDICT, JobState.SUCCEEDED, scans=1, model_id=model).id
    its_scan = session.scalars(select(ScanResult.scan_id).where(ScanResult.job_id == other)).one()
    version = builders.make_model(session, {"f1": 0.5}).version
    asked = delete_job(session, TENANT, job.id), scan_registry.delete(session, TENANT, its_scan)
    return [deletion.id for deletion in (*asked, delete_version(session, TENANT, str(version)))]


def _batch(session: Session, model: uuid.UUID) -> tuple[uuid.UUID, list[uuid.UUID], Claim, Claim]:
    """Units: explained, running, stalled, dispatched, reserved, queued, queued, scheduled; explaining the first."""
    batch = builders.make_job(session, JobKind.PREDICT_BATCH, scans=16, chunk=2, model_id=model)
    units = builders.units_of(session, batch)
    first = builders.claim(session, units[0])
    outcomes = builders.outcomes_of(session, first)
    lifecycle.succeed(session, first, outcomes=outcomes, enqueue_explanations=True)
    held = builders.claim(session, units[1])
    builders.claim(session, units[2])
    lifecycle.fail(session, builders.claim(session, units[7]), TRANSIENT, RETRY)
    unit_ids = [unit.id for unit in builders.units_of(session, batch)]
    explaining = builders.claim(session, session.get_one(Unit, unit_ids[8]))
    dispatch.dispatch(session, [unit_ids[3]], 15)
    dispatch.reserve(session, [unit_ids[4]])
    return batch.id, unit_ids, held, explaining


def _age(session: Session, cancelled: uuid.UUID) -> None:
    """Time has passed: a unit stalls, another one is due, a key has expired; one job was cancelled, but for its end."""
    long_ago = NOW - text("interval '2 days'")
    running = update(Unit).where(Unit.state == "running").execution_options(synchronize_session=False)
    session.execute(running.values(progress_at=long_ago, lease_expires_at=NOW + text("interval '2 days'")))
    session.execute(text("UPDATE units SET not_before = now() - interval '1 s' WHERE state = 'scheduled'"))
    session.execute(update(IdempotencyKey).values(created_at=long_ago))
    soon = NOW + text("interval '1 day'")  # for the checker, which allows its end to take seconds
    session.execute(update(Job).where(Job.id == cancelled).values(cancel_requested_at=soon))


def _checkpoint(epoch: int) -> checkpoints.StoredCheckpoint:
    return checkpoints.StoredCheckpoint(epoch, f"{epoch}.safetensors", Blob(SHA, 1))


HASTY = Settings(deletion_grace_seconds=1e-6)
Verb = Callable[[Session, World], Any]


def _send_again(session: Session, world: World) -> None:
    """All scans, also those that are being deleted, by their hashes."""
    columns = Scan.sha256, Scan.size, Scan.media_type
    rows = [{**row._asdict(), "tenant_id": TENANT, "id": new_id()} for row in session.execute(select(*columns))]
    scan_registry.register(session, rows)
    scan_registry.by_hash(session, TENANT, [row["sha256"] for row in rows])


def _predict_again(session: Session, world: World) -> None:
    """As a request that has found the scan before."""
    submission.submit(session, NewJob(TENANT, JobKind.PREDICT, Lane.URGENT), [NewResult(world.scan)])


def _delete_version(session: Session, world: World) -> None:
    delete_version(session, TENANT, "2")


def _outcomes(session: Session, world: World) -> list[Any]:
    return builders.outcomes_of(session, world.held)


def _submit(session: Session, world: World) -> None:
    scans = session.scalars(select(ScanResult.scan_id).where(ScanResult.job_id == world.batch))
    new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, model_id=world.model)
    submission.submit(session, new, [NewResult(scan) for scan in scans], chunk=4)


def _submit_training(session: Session, world: World) -> None:
    catalog.ready(session, TENANT, world.dataset)
    submission.submit(session, NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, dataset_id=world.dataset))


def _finish_training(session: Session, world: World) -> None:
    new = NewModel("a" * 64, ["Normal", "Tumor"], {}, SCORES, "d" * 64, "abc")
    promotion.register(session, world.training, new, GatePolicy())
    lifecycle.succeed(session, world.training, metrics=SCORES)


def _succeed_and_claim(session: Session, world: World) -> None:
    outcomes = _outcomes(session, world)
    lifecycle.succeed(session, world.held, outcomes=outcomes, enqueue_explanations=True)
    leases.claim_next(session, Lane.BATCH, "worker-b", 45)


def _explain(session: Session, world: World) -> None:
    lifecycle.succeed(session, world.explaining)
    explanations.insert_artifacts(session, world.explaining, _overlay())


def _overlay() -> list[explanations.NamedBlob]:
    return [(f"explanations/{uuid.uuid4()}.png", Blob(SHA, 1))]


def _record_gone(session: Session, world: World) -> None:
    due = deliveries.claim(session, 60, [], [])
    if due is not None:
        deliveries.record_attempt(session, due, deliveries.Attempt(410), ())


VERBS: dict[str, Verb] = {
    "submit": _submit,
    "submit a training": _submit_training,
    "retry": lambda session, world: submission.retry(session, TENANT, world.failed),
    "retry a check": lambda session, world: submission.retry(session, TENANT, world.unchecked_by),
    "delete the dataset": lambda session, world: catalog.delete(session, TENANT, world.dataset),
    "delete the unchecked dataset": lambda session, world: catalog.delete(session, TENANT, world.unchecked),
    "dispatch": lambda session, world: dispatch.dispatch(session, world.units, 0),
    "reserve": lambda session, world: dispatch.reserve(session, world.units),
    "release": lambda session, world: dispatch.release(session, world.units, 60),
    "request a yield": lambda session, world: dispatch.request_yield(session, world.units),
    "enqueue due": lambda session, world: lifecycle.enqueue_due(session),
    "claim": lambda session, world: leases.claim(session, world.units[3], "worker-b", 45),
    "claim the next": lambda session, world: leases.claim_next(session, Lane.BATCH, "worker-b", 45),
    "beat": lambda session, world: leases.beat(session, world.held, 45),
    "report": lambda session, world: lifecycle.report(session, world.held),
    "report progress": lambda session, world: lifecycle.report(session, world.held, progress=0.5, event=("e", {})),
    "succeed": _succeed_and_claim,
    "fail": lambda session, world: lifecycle.fail(session, world.held, TRANSIENT, RETRY, _outcomes(session, world)[:1]),
    "fail for good": lambda session, world: lifecycle.fail(session, world.held, BROKEN),
    "hand back": lambda session, world: lifecycle.requeue(session, world.held, "DRAINED"),
    "confirm the cancellation": lambda session, world: lifecycle.confirm_cancel(session, world.held),
    "cancel": lambda session, world: lifecycle.cancel(session, TENANT, world.batch),
    "end cancelled units": lambda session, world: completion.cancel_batch(session),
    "reap": lambda session, world: reaping.reap(session, retry=RETRY, stall=3600),
    "take back": lambda session, world: reaping.take_back(session, world.held.unit_id, world.held.fence, RETRY),
    "take back an explanation": lambda session, world: reaping.take_back(
        session, world.explaining.unit_id, world.explaining.fence, RETRY
    ),
    "store explanations": lambda session, world: explanations.save(session, world.explaining, _overlay()),
    "explain": _explain,
    "store a checkpoint": lambda session, world: checkpoints.save(session, world.training, _checkpoint(3)),
    "finish a training": _finish_training,
    "promote": lambda session, world: promotion.promote(
        session, TENANT, "1", GatePolicy(), force=True, reason="to see"
    ),
    "use an expired key": lambda session, world: idempotency.acquire(session, KEY, 24),
    "delete a job": lambda session, world: delete_job(session, TENANT, world.ended),
    "delete the failed job": lambda session, world: delete_job(session, TENANT, world.failed),
    "delete a scan": lambda session, world: scan_registry.delete(session, TENANT, world.scan),
    "delete a version": _delete_version,
    "delete rows of a job": lambda session, world: deletions.delete_batch(session, world.deleted[0], HASTY),
    "delete a few rows of a job": lambda session, world: deletions.delete_batch(session, world.deleted[0], HASTY, 2),
    "delete rows of a scan": lambda session, world: deletions.delete_batch(session, world.deleted[1], HASTY),
    "delete rows of a version": lambda session, world: deletions.delete_batch(session, world.deleted[2], HASTY),
    "send scans again": _send_again,
    "predict a scan again": _predict_again,
    "expire results": lambda session, world: results.expire(session, -1),
    "delete jobs": lambda session, world: retention.delete_jobs(session, -1),
    "release checkpoints": lambda session, world: retained_checkpoints.release(
        session, [world.training.job_id, world.failed], -1
    ),
    "prune keys": lambda session, world: idempotency.prune(session, 24),
    "prune loads": lambda session, world: submission.prune_loads(session),
    "remove the webhook": lambda session, world: webhooks.remove(session, TENANT, world.webhook),
    "claim a delivery": lambda session, world: deliveries.claim(session, 60, [], []),
    "disable the webhook": _record_gone,
    "deliver again": lambda session, world: deliveries.redeliver(session, TENANT, world.webhook, world.delivery),
    "prune deliveries": lambda session, world: deliveries.prune(session, -1),
}


class Arena:
    """Two connections that play verbs against each other, and a third one that watches whether one waits."""

    def __init__(self, database: Database) -> None:
        self._engine = make_engine(database.url, pool_size=4, options="-c deadlock_timeout=20ms")
        self._first, self._second = self._engine.connect(), self._engine.connect()
        self._watching = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with Session(self._first, expire_on_commit=False) as session:
            self.world = build(session)
            session.commit()
        self._pid = self._second.scalar(text("SELECT pg_backend_pid()"))
        self._second.rollback()
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        self._tables = self._watching.scalars(text(tables)).all()
        copies = "; ".join(f"CREATE TABLE saved.{table} AS TABLE public.{table}" for table in self._tables)
        self._watching.execute(text(f"CREATE SCHEMA saved; {copies}"))
        self._pool = ThreadPoolExecutor(1)
        for verb in VERBS.values():  # each connection prepares its statements once
            self._play(self._first, verb, keep=False)
            self._play(self._second, verb, keep=False)
        self.pauses = {name: self._pauses(verb) for name, verb in VERBS.items()}

    def close(self) -> None:
        """Leave the database as it was."""
        self._pool.shutdown()
        self._watching.execute(text("DROP SCHEMA saved CASCADE"))
        self._engine.dispose()

    def restore(self) -> None:
        """Undo what was committed."""
        self._watching.execute(text("SET session_replication_role = replica"))  # no triggers, no foreign keys
        copies = (f"DELETE FROM {name}; INSERT INTO {name} SELECT * FROM saved.{name}" for name in self._tables)  # noqa: S608
        self._watching.execute(text("; ".join(copies)))
        self._watching.execute(text("SET session_replication_role = origin"))

    def faults(self) -> list[str]:
        """What the checker finds."""
        with Session(self._first) as session:
            return faults(session)

    def deadlocks(self, first: str, second: str) -> list[int]:
        """The statements of the first verb before which the second one leads to a deadlock. Nothing is kept."""
        found = []
        for pause in self.pauses[first]:
            try:
                self.meet(VERBS[first], VERBS[second], pause)
            except DeadlockDetected:
                found.append(pause)
        return found

    def meet(self, first: Verb, second: Verb, pause: int, keep: bool = False) -> None:
        """Play the first verb, and from before its statement `pause` (or its end) on the second.

        Raises:
            DeadlockDetected
        """
        seen, started = 0, []

        def start(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == pause:
                started.append(self._start(second, keep))

        def start_at_the_end() -> None:
            if not started:
                started.append(self._start(second, keep))

        event.listen(self._first, "before_cursor_execute", start)
        try:
            self._play(self._first, first, keep, start_at_the_end)
        finally:
            event.remove(self._first, "before_cursor_execute", start)
            for playing in started:
                playing.result(30)

    def _start(self, verb: Verb, keep: bool) -> Future[None]:
        """Play the verb in a thread until it has ended or waits."""
        playing = self._pool.submit(self._play, self._second, verb, keep)
        waits = text("SELECT cardinality(pg_blocking_pids(:pid)) > 0")
        while wait([playing], 0.005).not_done and not self._watching.scalar(waits, {"pid": self._pid}):
            pass
        return playing

    def _play(
        self, connection: Connection, verb: Verb, keep: bool, before_end: Callable[[], None] = lambda: None
    ) -> None:
        try:
            with Session(connection) as session:
                try:
                    verb(session, self.world)
                except (RenalQError, IntegrityError):  # refused: what the other has done stands
                    session.rollback()
                before_end()
                session.commit() if keep else session.rollback()
        except OperationalError as error:
            if isinstance(error.orig, DeadlockDetected):
                raise error.orig from None
            if not isinstance(error.orig, LockNotAvailable):  # the reaper does not wait for long
                raise
            before_end()

    def _pauses(self, verb: Verb) -> list[int]:
        """The numbers of its statements that lock something while the verb holds locks already."""
        pid = self._first.scalar(text("SELECT pg_backend_pid()"))
        self._first.rollback()
        held = text("SELECT count(*) FROM pg_locks WHERE pid = :pid AND locktype IN ('transactionid', 'advisory')")
        seen: list[bool] = []

        def note(*args: Any) -> None:
            statement = args[2].lstrip()
            only_reads = statement.startswith("SELECT") and " FOR " not in statement and "advisory" not in statement
            seen.append(not only_reads and bool(self._watching.scalar(held, {"pid": pid})))

        event.listen(self._first, "before_cursor_execute", note)
        self._play(self._first, verb, keep=False)
        event.remove(self._first, "before_cursor_execute", note)
        assert seen
        return [number for number, matters in enumerate(seen, 1) if matters]


@pytest.fixture(scope="module")
def arena(databases: Databases) -> Iterator[Arena]:
    """One for all pairs."""
    with databases.borrow() as database:
        arena = Arena(database)
        yield arena
        arena.close()


def others(first: str) -> list[str]:
    """The verbs that this one is played with."""
    names = list(VERBS)
    return names[names.index(first) % EVERY :: EVERY]


def test_world_is_consistent(arena: Arena) -> None:
    assert arena.faults() == []


@pytest.mark.parametrize("first", VERBS)
def test_no_verb_deadlocks_with_another(arena: Arena, first: str) -> None:
    assert {second: found for second in others(first) if (found := arena.deadlocks(first, second))} == {}


@pytest.mark.parametrize("first", VERBS)
def test_each_verb_after_another_leaves_the_database_consistent(arena: Arena, first: str) -> None:
    for second in others(first):
        arena.meet(VERBS[first], VERBS[second], pause=0, keep=True)
        assert arena.faults() == [], second
        arena.restore()


def test_retry_that_locks_the_dataset_last_deadlocks(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation test: the pairs above would find a wrong order."""
    monkeypatch.setattr(submission, "_lock_dataset", lambda *_: None)
    assert arena.deadlocks("retry", "delete the dataset") != []
