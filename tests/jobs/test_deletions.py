"""Deletions on request: what goes, what stays for others, what refuses, and what a crash in the middle leaves."""

import io
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs.datasets import catalog
from jobs.db import Base, Sessions
from jobs.deletions import receipts
from jobs.deletions.of_jobs import delete_job
from jobs.errors import (
    DatasetInUse,
    JobNotFound,
    ModelNotFound,
    NothingBefore,
    ScanNotFound,
    StillNeeded,
    WrongState,
)
from jobs.events import webhooks
from jobs.models import deletion as models
from jobs.models import feedback, promotion, registry
from jobs.models.gate import GatePolicy
from jobs.queue import lifecycle, submission
from jobs.queue.explanations import artifact_name, insert_artifacts
from jobs.results import queries, scan_registry, studies, summary
from jobs.retention import blobs, deletions, jobs
from jobs.settings import Settings
from jobs.states import JobKind, JobState, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import (
    Artifact,
    Checkpoint,
    Dataset,
    Deletion,
    IdempotencyKey,
    Job,
    ModelEvaluation,
    ModelVersion,
    Promotion,
    ReleasedRun,
    Scan,
    ScanResult,
    Truth,
)
from ml.spec.pipeline import CACHE_OWNERS
from tests import builders
from tests.builders import TENANT

GRACE = 1e-6
STAYS = {
    "deletions", "api_keys", "tenant_loads", "webhooks", "alembic_version", "job_counts", "unit_counts",
    "storage_changes",
}  # fmt: skip


@pytest.fixture
def hasty(settings: Settings) -> Settings:
    """Settings with which nothing waits."""
    return settings.model_copy(update={"deletion_grace_seconds": GRACE})


@pytest.fixture
def store(settings: Settings) -> BlobStore:
    return BlobStore(settings.artifacts)


def finish(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    """All batches, as the leading dispatcher does them, until they change nothing more."""
    before, unchanged = state(sessions, settings), 0
    while unchanged < 3:
        with sessions.begin() as session:
            session.execute(text("UPDATE deletions SET due_at = now() WHERE finished_at IS NULL"))
            session.execute(text("UPDATE released_blobs SET due_at = now()"))
        deletions.step(sessions, store, settings)
        blobs.step(sessions, store, settings)
        after = state(sessions, settings)
        before, unchanged = after, unchanged + 1 if after == before else 0


def state(sessions: Sessions, settings: Settings) -> object:
    with sessions() as session:
        receipts = session.execute(select(Deletion.counts, Deletion.finished_at).order_by(Deletion.id)).all()
    return rows(sessions), sorted(files(settings)), [tuple(each) for each in receipts]


def stored(store: BlobStore, content: bytes | None = None) -> str:
    return store.put(io.BytesIO(content or os.urandom(20))).sha256


def predicted(sessions: Sessions, store: BlobStore, scans: int = 3, **new: object) -> uuid.UUID:
    """An ended batch of stored scans, each explained, with a delivery of its end."""
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=scans, chunk=2, **new)
        for scan in session.scalars(select(Scan).where(Scan.id.in_(scans_of(session, job.id)))):
            scan.sha256 = stored(store)
        session.flush()
        named = {name: f"canary-{name}" for name in ("name", "custom_id", "patient", "study")}
        session.execute(update(ScanResult).where(ScanResult.job_id == job.id).values(**named))
        for unit in builders.units_of(session, job):
            held = builders.claim(session, unit)
            lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
        for ordinal in range(scans):
            named = [
                (artifact_name(ordinal, part), store.put(io.BytesIO(os.urandom(20)))) for part in (".png", ".x.png")
            ]
            insert_artifacts(session, held, named)
        return job.id


def scans_of(session: Session, job_id: uuid.UUID) -> list[uuid.UUID]:
    mine = select(ScanResult.scan_id).where(ScanResult.job_id == job_id).order_by(ScanResult.ordinal)
    return [scan_id for scan_id in session.scalars(mine) if scan_id]


def ask(sessions: Sessions, verb: Callable[..., Deletion], target: object, **more: object) -> uuid.UUID:
    with sessions.begin() as session:
        return verb(session, TENANT, target, **more).id


def receipt(sessions: Sessions, deletion_id: uuid.UUID) -> Deletion:
    with sessions() as session:
        return session.get_one(Deletion, deletion_id)


def rows(sessions: Sessions) -> dict[str, int]:
    with sessions() as session:
        tables = Base.metadata.tables.items()
        counts = {name: session.scalar(select(func.count()).select_from(table)) or 0 for name, table in tables}
    return {name: number for name, number in counts.items() if number and name not in STAYS}


def files(settings: Settings) -> list[Path]:
    return [path for path in Path(settings.artifacts).rglob("*") if path.is_file()]


# --- jobs ---


def test_a_deleted_job_leaves_its_receipt_only(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    with sessions.begin() as session:
        webhooks.create(session, TENANT, "https://receiver.example", list(webhooks.EventType))
        session.add(IdempotencyKey(tenant_id=TENANT, key_sha256="k" * 64, fingerprint="f", status=202, body="{}"))
        model = builders.make_model(session, weights_sha256=stored(store))
    before = rows(sessions), len(files(hasty))
    job_id = predicted(sessions, store, model_id=model.id, idempotency_key="k" * 64)
    with sessions.begin() as session:
        view = queries.job(session, TENANT, job_id)
        feedback.record(session, view, scans_of(session, job_id)[0], "Tumor")
        retried = f'{{"Location": "/v1/jobs/{job_id}"}}'
        session.execute(
            text(
                "INSERT INTO idempotency_keys (tenant_id, key_sha256, fingerprint, headers) VALUES (:t, 'r', 'f', :h)"
            ),
            {"t": TENANT, "h": retried},
        )
    assert rows(sessions)["deliveries"] > before[0]["deliveries"]
    asked = ask(sessions, delete_job, job_id)
    with sessions() as session:
        for read in (queries.job, lambda *given: lifecycle.cancel(*given), lambda *given: submission.retry(*given)):
            with pytest.raises(JobNotFound):
                read(session, TENANT, job_id)
        assert job_id not in [
            view.job.id for view in queries.jobs(session, TENANT, queries.JobFilter(), 100, None).data
        ]
    finish(sessions, store, hasty)
    after = rows(sessions)
    assert "idempotency_keys" not in after
    counted = {"prediction_counts", "study_counts"}
    assert {name: number for name, number in after.items() if name not in counted} == {
        name: number for name, number in before[0].items() if name not in {"idempotency_keys", *counted}
    }
    assert len(files(hasty)) == before[1]
    found = receipt(sessions, asked)
    assert found.finished_at is not None
    assert found.counts == {
        "results": 3, "artifacts": 6, "units": 2, "events": 3, "jobs": 1, "scans": 3, "feedback": 1, "deliveries": 2,
        "files": 9,
    }  # fmt: skip


def test_scans_that_others_need_stay(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    job_id = predicted(sessions, store)
    with sessions.begin() as session:
        shared, resent, own = scans_of(session, job_id)
        new = submission.NewJob(TENANT, JobKind.PREDICT, Lane.URGENT)
        submission.submit(session, new, [submission.NewResult(shared)])
    asked = ask(sessions, delete_job, job_id)
    while rows(sessions).get("scan_results", 0) > 1:
        deletions.step(sessions, store, hasty)
    with sessions.begin() as session:
        assert scan_registry.known(session, TENANT, [resent]) == {resent}, "it is about to be used again"
    finish(sessions, store, hasty)
    with sessions() as session:
        assert set(session.scalars(select(Scan.id))) == {shared, resent}
        assert session.scalars(select(Scan.deletion_id)).all() == [None, None]
        for scan in session.scalars(select(Scan)):
            assert store.exists(scan.sha256)
    assert receipt(sessions, asked).counts["scans"] == 1
    assert own not in {shared, resent}


def test_scans_are_kept_if_asked(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    job_id = predicted(sessions, store)
    ask(sessions, delete_job, job_id, with_scans=False)
    finish(sessions, store, hasty)
    assert rows(sessions)["scans"] == 3
    assert "scan_results" not in rows(sessions)


def test_what_is_needed_says_so(sessions: Sessions) -> None:
    with sessions.begin() as session:
        running = builders.make_job(session, JobKind.PREDICT, JobState.RUNNING, scans=1).id
        trained = builders.make_model(session).job_id
        dataset = builders.make_dataset(session)
        check = builders.make_job(session, JobKind.INGEST, JobState.SUCCEEDED, dataset_id=dataset.id).id
        session.execute(update(Dataset).where(Dataset.id == dataset.id).values(job_id=check))
        failed = builders.make_job(session, state=JobState.FAILED).id
        submission.retry(session, TENANT, failed)
    with sessions.begin() as session:
        for job_id, error, words in (
            (running, WrongState, "POST /jobs/.*/cancel"),
            (trained, StillNeeded, "DELETE /models/1"),
            (check, StillNeeded, "DELETE /datasets/"),
            (failed, StillNeeded, "cancel it"),
            (builders.unknown_id(), JobNotFound, "GET /jobs"),
        ):
            with pytest.raises(error, match=words):
                delete_job(session, TENANT, job_id)
        assert session.scalar(select(func.count()).select_from(Deletion)) == 0


def test_a_repeated_request_gets_the_same_receipt(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    job_id = predicted(sessions, store)
    asked = ask(sessions, delete_job, job_id)
    assert ask(sessions, delete_job, job_id) == asked
    finish(sessions, store, hasty)
    assert ask(sessions, delete_job, job_id) == asked
    with sessions() as session, pytest.raises(JobNotFound):
        delete_job(session, "another", job_id)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_batches_are_bounded_and_a_crash_between_any_two_is_made_good(
    sessions: Sessions, store: BlobStore, hasty: Settings, rows_at_once: int
) -> None:
    job_id = predicted(sessions, store)
    asked = ask(sessions, delete_job, job_id)
    done = False
    while not done:  # nothing is kept in memory between two transactions
        before = rows(sessions)
        with sessions.begin() as session:
            done = deletions.delete_batch(session, asked, hasty, rows_at_once)
        assert sum(before.values()) - sum(rows(sessions).values()) <= rows_at_once + 1  # and the emptied job
        if rows(sessions).keys() <= {"released_blobs"}:
            finish(sessions, store, hasty)
            done = True
    assert rows(sessions) == {}
    assert files(hasty) == []


def test_a_receipt_waits_for_its_files(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    asked = ask(sessions, delete_job, predicted(sessions, store))
    while deletions.step(sessions, store, settings):
        pass
    blobs.step(sessions, store, settings)
    with sessions() as session:
        found = receipts.get(session, TENANT, asked)
    assert (found.deletion.finished_at, found.files_left) == (None, 9)
    with sessions.begin() as session:
        session.execute(text("UPDATE released_blobs SET due_at = now()"))
    blobs.step(sessions, store, settings)
    with sessions.begin() as session:
        session.execute(text("UPDATE deletions SET due_at = now()"))
    deletions.step(sessions, store, settings)
    assert receipt(sessions, asked).finished_at is not None
    assert files(settings) == []


def test_a_finished_receipt_cannot_be_changed_nor_any_deleted(
    sessions: Sessions, store: BlobStore, hasty: Settings
) -> None:
    done = ask(sessions, delete_job, predicted(sessions, store))
    finish(sessions, store, hasty)
    open_one = ask(sessions, delete_job, predicted(sessions, store))
    for statement in (
        update(Deletion).where(Deletion.id == done).values(counts={}),
        delete(Deletion).where(Deletion.id == done),
        delete(Deletion).where(Deletion.id == open_one),
    ):
        with pytest.raises(DBAPIError, match="is history"), sessions.begin() as session:
            session.execute(statement)


def test_retention_leaves_alone_what_a_client_deletes(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    """It would not take the scans along."""
    from jobs.retention import results

    job_id = predicted(sessions, store)
    ask(sessions, delete_job, job_id)
    with sessions.begin() as session:
        assert results.expire(session, 1e-9) is False
        assert jobs.delete_jobs(session, 1e-9) is False
    finish(sessions, store, hasty)
    assert "scans" not in rows(sessions)


def test_deletions_take_turns(
    sessions: Sessions, store: BlobStore, hasty: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = predicted(sessions, store, scans=9), predicted(sessions, store, scans=1)
    for job_id in (large, small):
        ask(sessions, delete_job, job_id)
    batch = deletions.delete_batch
    monkeypatch.setattr(deletions, "delete_batch", lambda session, found, given: batch(session, found, given, 2))
    for _ in range(14):
        deletions.step(sessions, store, hasty)
    with sessions() as session:
        assert session.get(Job, small) is None
        assert session.get(Job, large) is not None


# --- trainings ---


def trained(sessions: Sessions, store: BlobStore, settings: Settings) -> tuple[int, uuid.UUID]:
    """A version that is not champion, with all that a training leaves."""
    with sessions.begin() as session:
        if registry.find_champion(session, TENANT) is None:
            builders.make_model(session, weights_sha256=stored(store))
        weights = stored(store)
        version = builders.make_model(session, {"f1": 0.9}, weights_sha256=weights)
        blob = {"tenant_id": TENANT, "size": 1, "job_id": version.job_id}
        session.add(Artifact(name="model.safetensors", sha256=weights, media_type="a/b", **blob))
        session.add(Artifact(name="report.html", sha256=stored(store), media_type="text/html", **blob))
        session.add(Checkpoint(fence=1, epoch=1, path="", sha256="c" * 64, **blob))
        session.execute(update(Job).where(Job.id == version.job_id).values(mlflow_run_id="run"))
    folder = Path(settings.artifacts, "checkpoints", str(version.job_id))
    folder.mkdir(parents=True)
    (folder / "1-1.safetensors").write_bytes(b"epoch 1")
    settings.work.mkdir(parents=True, exist_ok=True)
    (settings.work / f"{version.job_id}-attempt-1.log").write_text("what the child said")
    return version.version, version.job_id


def test_a_deleted_version_takes_its_training_along(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    number, job_id = trained(sessions, store, hasty)
    with sessions() as session:
        champion = registry.find_champion(session, TENANT)
        assert champion is not None
    asked = ask(sessions, models.delete_version, str(number))
    with sessions() as session:
        with pytest.raises(ModelNotFound):
            registry.resolve(session, TENANT, str(number))
        with pytest.raises(JobNotFound):
            queries.job(session, TENANT, job_id)
    finish(sessions, store, hasty)
    with sessions() as session:
        assert session.scalars(select(ModelVersion.id)).all() == [champion.id]
        assert session.scalars(select(Job.id)).all() == [champion.job_id]
        for table in (Artifact, Checkpoint):
            assert session.scalars(select(table)).all() == []
        assert session.scalars(select(ModelEvaluation.model_id).distinct()).all() in ([], [champion.id])
        run = session.scalars(select(ReleasedRun)).one()
        assert (run.job_id, run.run_id, run.deletion_id) == (job_id, "run", asked)
    assert [path.name for path in files(hasty)] == [champion.weights_sha256]
    assert list(hasty.work.iterdir()) == []
    assert receipt(sessions, asked).counts["models"] == 1


def test_the_number_of_a_deleted_version_is_not_used_again(
    sessions: Sessions, store: BlobStore, hasty: Settings
) -> None:
    number, _ = trained(sessions, store, hasty)
    ask(sessions, models.delete_version, str(number))
    finish(sessions, store, hasty)
    with sessions.begin() as session:
        assert builders.make_model(session, {"f1": 0.5}).version == number + 1


def test_a_version_in_use_says_so(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    number, job_id = trained(sessions, store, hasty)
    with sessions.begin() as session:
        version = registry.resolve(session, TENANT, str(number))
        with pytest.raises(StillNeeded, match="Promote another one"):
            models.delete_version(session, TENANT, "1")
        with pytest.raises(ModelNotFound):
            models.delete_version(session, TENANT, "77")
        pinned = builders.make_job(session, JobKind.PREDICT, scans=1, model_id=version.id)
        with pytest.raises(StillNeeded, match=str(pinned.id)):
            models.delete_version(session, TENANT, str(number))
        lifecycle.cancel(session, TENANT, pinned.id)
        begun = builders.make_job(session, base_model_id=version.id)
        with pytest.raises(StillNeeded, match=str(begun.id)):
            models.delete_version(session, TENANT, str(number))
        lifecycle.cancel(session, TENANT, begun.id)
        again = builders.make_job(session, reproduction_of=job_id)
        with pytest.raises(StillNeeded, match=str(again.id)):
            models.delete_version(session, TENANT, str(number))


def test_a_job_that_found_the_version_before_is_still_done(
    sessions: Sessions, store: BlobStore, settings: Settings, hasty: Settings
) -> None:
    number, _ = trained(sessions, store, hasty)
    with sessions.begin() as session:
        version = registry.resolve(session, TENANT, str(number))
    ask(sessions, models.delete_version, str(number))
    finish(sessions, store, settings)
    assert store.exists(version.weights_sha256), "a request may have found it just before"
    with sessions.begin() as session:
        late = builders.make_job(session, JobKind.PREDICT, scans=1, model_id=version.id)
    finish(sessions, store, hasty)
    assert store.exists(version.weights_sha256)
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, late)[0])
        assert registry.by_id(session, version.id).weights_sha256 == version.weights_sha256
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    finish(sessions, store, hasty)
    assert not store.exists(version.weights_sha256)


def test_a_rollback_passes_deleted_versions_by(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    with sessions.begin() as session:
        for f1 in (0.95, 0.96, 0.97):
            builders.make_model(session, {"f1": f1}, weights_sha256=stored(store))
            number = session.scalar(select(func.max(ModelVersion.version)))
            promotion.promote(session, TENANT, str(number), GatePolicy(), force=True, reason="To see.")
    ask(sessions, models.delete_version, "2")
    finish(sessions, store, hasty)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).where(Promotion.version == 2)) == 1, "history stays"
        assert promotion.rollback(session, TENANT).version == 1
        with pytest.raises(NothingBefore):
            promotion.rollback(session, TENANT)


def test_what_needs_a_deleted_version_is_not_retried(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    number, _ = trained(sessions, store, hasty)
    with sessions.begin() as session:
        version = registry.resolve(session, TENANT, str(number))
        failed = builders.make_job(session, JobKind.PREDICT, JobState.FAILED, scans=1, model_id=version.id).id
    ask(sessions, models.delete_version, str(number))
    with sessions() as session, pytest.raises(WrongState, match="version that this job needs was deleted"):
        submission.retry(session, TENANT, failed)


# --- scans ---


def test_a_deleted_scan_takes_results_explanations_and_feedback_along(
    sessions: Sessions, store: BlobStore, hasty: Settings
) -> None:
    with sessions.begin() as session:
        model = builders.make_model(session, weights_sha256=stored(store))
    job_id = predicted(sessions, store, model_id=model.id)
    with sessions.begin() as session:
        first, gone, last = scans_of(session, job_id)
        view = queries.job(session, TENANT, job_id)
        for scan_id in (first, gone):
            feedback.record(session, view, scan_id, "Tumor")
        sha256 = session.get_one(Scan, gone).sha256
    asked = ask(sessions, scan_registry.delete, gone)
    with sessions() as session, pytest.raises(ScanNotFound):
        scan_registry.get(session, TENANT, gone)
    finish(sessions, store, hasty)
    with sessions() as session:
        assert set(session.scalars(select(Scan.id))) == {first, last}
        assert session.scalars(select(Truth.scan_id)).all() == [first]
        names = session.scalars(select(Artifact.name).where(Artifact.job_id == job_id).order_by(Artifact.name)).all()
        assert names == [artifact_name(ordinal, part) for ordinal in (0, 2) for part in (".png", ".x.png")]
        view = queries.job(session, TENANT, job_id)
        found = queries.results(session, view).data[1]
        left = {name: getattr(found, name) for name in ScanResult.__table__.columns.keys()}  # noqa: SIM118
        assert left["error"]["code"] == "SCAN_DELETED"
        assert "canary" not in str(left)
        assert [left[name] for name in ("scan_id", "label", "confidence", "probabilities", "patient")] == [None] * 5
        assert summary.summary(session, view).counts["succeeded"] == view.job.succeeded == 3
        assert [answer.slices for answer in studies.studies(session, view, hasty).data] == [2]
        assert session.scalar(text("SELECT count(*) FROM scan_results WHERE scan_results::text ~ 'canary'")) == 2
    assert not store.exists(sha256)
    assert receipt(sessions, asked).counts == {"results": 1, "artifacts": 2, "feedback": 1, "scans": 1, "files": 3}


def test_a_scan_of_an_unfinished_job_stays(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT, scans=1)
        scan_id = scans_of(session, job.id)[0]
        with pytest.raises(StillNeeded, match=str(job.id)):
            scan_registry.delete(session, TENANT, scan_id)
        lifecycle.cancel(session, TENANT, job.id)
        assert scan_registry.delete(session, TENANT, scan_id).finished_at is None


def test_a_job_that_found_the_scan_before_is_still_done(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    with sessions.begin() as session:
        scan = builders.make_scan(session, sha256=stored(store))
    ask(sessions, scan_registry.delete, scan.id)
    with sessions.begin() as session:
        new = submission.NewJob(TENANT, JobKind.PREDICT, Lane.URGENT)
        job = submission.submit(session, new, [submission.NewResult(scan.id)])
    finish(sessions, store, hasty)
    assert store.exists(scan.sha256)
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
    finish(sessions, store, hasty)
    assert not store.exists(scan.sha256)
    with sessions() as session:
        assert scans_of(session, job.id) == []


def test_the_same_bytes_sent_again_are_another_scan_and_stay(
    sessions: Sessions, store: BlobStore, hasty: Settings
) -> None:
    with sessions.begin() as session:
        scan = builders.make_scan(session, sha256=stored(store))
    ask(sessions, scan_registry.delete, scan.id)
    with sessions.begin() as session:
        copied = {name: getattr(scan, name) for name in ("tenant_id", "sha256", "size", "media_type")}
        scan_registry.register(session, [{**copied, "id": builders.unknown_id()}])
        again = scan_registry.by_hash(session, TENANT, [scan.sha256])[scan.sha256]
    assert again != scan.id
    finish(sessions, store, hasty)
    with sessions() as session:
        assert session.scalars(select(Scan.id)).all() == [again]
    assert store.exists(scan.sha256)


# --- datasets ---


def test_a_deleted_dataset_takes_its_check_and_its_cache_along(
    sessions: Sessions, store: BlobStore, hasty: Settings
) -> None:
    with sessions.begin() as session:
        dataset, other = (builders.make_dataset(session) for _ in range(2))
        dataset.archive_sha256, other.archive_sha256 = stored(store), stored(store)
        check = builders.make_job(session, JobKind.INGEST, JobState.SUCCEEDED, dataset_id=dataset.id)
        dataset.job_id = check.id
        used = builders.make_job(session, state=JobState.FAILED, dataset_id=dataset.id).id
        session.refresh(dataset)
        session.refresh(other)
    mine = cached(hasty, "a", str(dataset.id))
    as_test, older, kept = (
        cached(hasty, "b", f"{other.id}\n{dataset.id}"),
        cached(hasty, "c", ""),
        cached(hasty, "d", str(other.id)),
    )
    asked = ask(sessions, catalog.delete, dataset.id)
    finish(sessions, store, hasty)
    with sessions() as session:
        assert session.scalars(select(Dataset.id)).all() == [other.id]
        assert session.scalars(select(Job.id)).all() == [used]
        assert session.get_one(Job, used).dataset_id is None
    assert [path.name for path in files(hasty)] == [other.archive_sha256]
    assert [entry.exists() for entry in (mine, as_test, older, kept)] == [False, False, False, True]
    assert receipt(sessions, asked).counts == {"datasets": 1, "jobs": 1, "units": 1, "events": 3, "files": 1}


def cached(settings: Settings, digit: str, owners: str) -> Path:
    entry = settings.feature_cache / (digit * 64)
    entry.mkdir(parents=True)
    (entry / "pixels.npy").write_bytes(b"a patient's kidney")
    if owners:
        (entry / CACHE_OWNERS).write_text(owners)
    return entry


def test_a_dataset_in_use_names_the_job(sessions: Sessions) -> None:
    with sessions.begin() as session:
        dataset = builders.make_dataset(session)
        job = builders.make_job(session, dataset_id=dataset.id)
        with pytest.raises(DatasetInUse, match=str(job.id)):
            catalog.delete(session, TENANT, dataset.id)


# --- retention ---


def test_old_versions_and_datasets_go_by_the_same_path(sessions: Sessions, store: BlobStore, hasty: Settings) -> None:
    number, _ = trained(sessions, store, hasty)
    with sessions.begin() as session:
        dataset = builders.make_dataset(session)
        used = builders.make_dataset(session)
        builders.make_job(session, dataset_id=used.id)
    for days, more in ((1, False), (1e-9, True), (1e-9, False)):
        with sessions.begin() as session:
            assert models.delete_old(session, days) is more
            assert catalog.delete_old(session, days) is more
    finish(sessions, store, hasty)
    with sessions() as session:
        assert session.scalars(select(ModelVersion.champion)).all() == [True]
        assert session.scalars(select(Dataset.id)).all() == [used.id]
        asked = session.execute(select(Deletion.kind, Deletion.target, Deletion.by_key).order_by(Deletion.id)).all()
    assert [tuple(row) for row in asked] == [("model", str(number), None), ("dataset", str(dataset.id), None)]


def test_retention_of_a_training_releases_its_run(sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.FAILED)
        session.execute(update(Job).where(Job.id == job.id).values(mlflow_run_id="run"))
    with sessions.begin() as session:
        assert jobs.delete_jobs(session, 1e-9) is False
        run = session.scalars(select(ReleasedRun)).one()
        assert (run.job_id, run.run_id, run.deletion_id) == (job.id, "run", None)
        assert run.due_at > session.scalar(select(func.now() + timedelta(minutes=4))), (
            "its worker may still write to it"
        )


def test_every_table_that_refers_to_what_can_be_deleted_is_known_here() -> None:
    """A new one must be thought of in jobs/retention/deletions.py."""
    deletable = ("jobs", "scans", "model_versions", "datasets")
    keys = [key for table in Base.metadata.tables.values() for key in table.foreign_keys]
    referring = {key.parent.table.name for key in keys if key.column.table.name in deletable}
    assert referring == {
        "artifacts", "checkpoints", "job_events", "job_webhooks", "jobs", "model_evaluations", "model_versions",
        "prediction_counts", "scan_results", "study_counts", "truths", "units",
    }  # fmt: skip
