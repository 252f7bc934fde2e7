"""Blobs end with their last row: reference counts, the race with equal bytes, orphans; in a folder and over fsspec."""

import io
import os
import uuid
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from jobs.db import Base, Sessions, seconds
from jobs.queue import lifecycle
from jobs.queue.explanations import artifact_name
from jobs.retention import blobs, orphans, results
from jobs.retention.orphans import OrphanSweep
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.storage.blobs import Blob, BlobStore
from jobs.tables import Artifact, ReleasedBlob, Scan
from tests import builders

NO_BLOBS = {
    "api_keys.secret_sha256",
    "idempotency_keys.key_sha256",
    "checkpoints.sha256",  # of a named file, which goes with its row: see jobs/retention/checkpoints.py
    "released_blobs.sha256",
}
PICTURE = b"an overlay that shows a patient's kidney"


class WatchedStore(BlobStore):
    """A store that must not be asked while a transaction is open."""

    def __init__(self, url: str, sessions: Sessions) -> None:
        super().__init__(url)
        self._pool = sessions.kw["bind"].pool

    def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
        if name in ("set_aside", "put_back", "delete_aside", "entries", "remove_partial"):
            assert self._pool.checkedout() == 0, f"{name} inside a transaction"
        return super().__getattribute__(name)


@pytest.fixture(params=["folder", "fsspec"])
def store(request: pytest.FixtureRequest, settings: Settings, sessions: Sessions) -> BlobStore:
    url = settings.artifacts if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    return WatchedStore(url, sessions)


def add_scan(sessions: Sessions, blob: Blob, tenant: str = builders.TENANT) -> uuid.UUID:
    with sessions.begin() as session:
        return builders.make_scan(session, tenant, blob.sha256).id


def drop_scans(sessions: Sessions, *scan_ids: uuid.UUID) -> None:
    with sessions.begin() as session:
        session.execute(delete(Scan).where(Scan.id.in_(scan_ids)))


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    while blobs.step(sessions, store, settings):
        pass


def wait(sessions: Sessions, some_seconds: float = blobs.GRACE_SECONDS) -> None:
    """Let the time pass until what is set aside, or was found without a row, is due."""
    with sessions.begin() as session:
        session.execute(update(ReleasedBlob).values(due_at=ReleasedBlob.due_at - seconds(some_seconds)))


def listed(sessions: Sessions) -> dict[str, bool]:
    with sessions() as session:
        return {row.sha256: row.aside for row in session.scalars(select(ReleasedBlob))}


def is_readable(store: BlobStore, blob: Blob) -> bool:
    try:
        with store.open(blob.sha256) as stream:
            return stream.read(1) != b""
    except FileNotFoundError:
        return False


def test_every_column_with_a_hash_is_declared() -> None:
    hashes = {str(column) for table in Base.metadata.tables.values() for column in table.c if "sha256" in column.name}
    assert hashes == {f"{ref.class_.__tablename__}.{ref.key}" for ref in blobs.REFERENCES} | NO_BLOBS


def test_every_deleted_row_that_refers_to_a_blob_lists_it(sessions: Sessions) -> None:
    with sessions.begin() as session:
        model, dataset = builders.make_model(session, weights_sha256="1" * 64), builders.make_dataset(session)
        dataset.archive_sha256 = "2" * 64
        artifact = {"job_id": model.job_id, "tenant_id": builders.TENANT, "size": 1, "media_type": "image/png"}
        session.add(Artifact(name="a", sha256="3" * 64, **artifact))
        builders.make_scan(session, sha256="4" * 64)
    with sessions.begin() as session:
        session.execute(text("ALTER TABLE promotions DISABLE TRIGGER promotions_are_kept"))
        session.execute(text("DELETE FROM promotions"))
        for ref in blobs.REFERENCES:
            session.execute(delete(ref.class_))
        session.execute(text("ALTER TABLE promotions ENABLE TRIGGER promotions_are_kept"))
    assert listed(sessions) == dict.fromkeys((digit * 64 for digit in "1234"), False)


def test_expired_explanations_are_nowhere_below_home(sessions: Sessions, settings: Settings) -> None:
    store = BlobStore(settings.artifacts)
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))
        for ordinal in range(2):
            blob = store.put(io.BytesIO(PICTURE + bytes([ordinal])))
            artifact = {"tenant_id": builders.TENANT, "size": blob.size, "media_type": "image/png"}
            session.add(Artifact(job_id=job.id, name=artifact_name(ordinal), sha256=blob.sha256, **artifact))
    assert pictures_below(settings.home) == 2
    with sessions.begin() as session:
        results.expire(session, 1e-9)
    step(sessions, store, settings)
    wait(sessions)
    step(sessions, store, settings)
    assert pictures_below(settings.home) == 0
    assert listed(sessions) == {}


def pictures_below(folder: Path) -> int:
    return sum(PICTURE in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_blob_stays_while_any_tenant_needs_it(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    blob = store.put(io.BytesIO(PICTURE))
    mine, theirs = add_scan(sessions, blob), add_scan(sessions, blob, "other")
    drop_scans(sessions, mine)
    step(sessions, store, settings)
    assert listed(sessions) == {}
    assert store.exists(blob.sha256)
    drop_scans(sessions, theirs)
    step(sessions, store, settings)
    wait(sessions)
    step(sessions, store, settings)
    assert not is_readable(store, blob)


def test_equal_bytes_stored_during_a_deletion_are_never_missing(
    sessions: Sessions, store: BlobStore, settings: Settings
) -> None:
    """One process found them stored before they were set aside, and commits its row afterwards."""
    blob = store.put(io.BytesIO(PICTURE))
    drop_scans(sessions, add_scan(sessions, blob))
    store.put(io.BytesIO(PICTURE))
    step(sessions, store, settings)
    assert not store.exists(blob.sha256)
    assert listed(sessions) == {blob.sha256: True}
    again = add_scan(sessions, blob)
    assert is_readable(store, blob)
    wait(sessions)
    step(sessions, store, settings)
    assert store.exists(blob.sha256)
    assert listed(sessions) == {}
    drop_scans(sessions, again)
    step(sessions, store, settings)
    assert listed(sessions) == {blob.sha256: True}


def test_bytes_stored_anew_after_a_deletion_began_stay(
    sessions: Sessions, store: BlobStore, settings: Settings
) -> None:
    blob = store.put(io.BytesIO(PICTURE))
    drop_scans(sessions, add_scan(sessions, blob))
    step(sessions, store, settings)
    store.put(io.BytesIO(PICTURE))  # its row is committed after the other copy is deleted for good
    wait(sessions)
    step(sessions, store, settings)
    add_scan(sessions, blob)
    assert store.exists(blob.sha256)


def test_blob_released_again_waits_again(sessions: Sessions, store: BlobStore, settings: Settings) -> None:
    blob = store.put(io.BytesIO(PICTURE))
    drop_scans(sessions, add_scan(sessions, blob))
    step(sessions, store, settings)
    wait(sessions)
    with sessions() as session:
        planned = blobs.plan(session)
    assert [one.action for one in planned] == [blobs.Action.DELETE]
    drop_scans(sessions, add_scan(sessions, blob))
    with sessions.begin() as session:
        blobs.record(session, planned)
    assert listed(sessions) == {blob.sha256: False}


def test_blob_that_cannot_be_deleted_delays_no_other(
    sessions: Sessions, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(settings.artifacts)
    stuck, other = store.put(io.BytesIO(b"stuck")), store.put(io.BytesIO(b"other"))
    for blob in (stuck, other):
        drop_scans(sessions, add_scan(sessions, blob))
    move = BlobStore.set_aside

    def refuse(store: BlobStore, sha256: str) -> None:
        if sha256 == stuck.sha256:
            raise PermissionError
        move(store, sha256)

    monkeypatch.setattr(BlobStore, "set_aside", refuse)
    step(sessions, store, settings)
    assert listed(sessions) == {stuck.sha256: False, other.sha256: True}
    monkeypatch.undo()
    wait(sessions)
    step(sessions, store, settings)
    assert listed(sessions) == {stuck.sha256: True}


def test_references_are_looked_up_by_indexes(sessions: Sessions) -> None:
    """A night deletes as many blobs as it has scans: none of these may read a table."""
    with sessions.begin() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        plans = [_plan(session, f"SELECT FROM {table} WHERE sha256 = 'x'") for table in ("scans", "artifacts")]
    assert ["Seq Scan" in plan for plan in plans] == [False, False]
    assert "uq_scans_sha256_tenant_id" in plans[0]
    assert "ix_artifacts_sha256" in plans[1]


def _plan(session: Session, query: str) -> str:
    return "\n".join(session.scalars(text(f"EXPLAIN {query}")))


# --- orphans ---


def sweep(sessions: Sessions, store: BlobStore, settings: Settings) -> int:
    """A round; returns its steps."""
    one_round, steps = OrphanSweep(), 1
    while one_round.step(sessions, store, settings):
        steps += 1
    return steps


def test_blobs_without_a_row_are_deleted_after_a_time(
    sessions: Sessions, store: BlobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "FOLDERS", 1)
    needed, orphan, late = (store.put(io.BytesIO(word)) for word in (b"needed", b"orphan", b"late"))
    add_scan(sessions, needed)
    assert sweep(sessions, store, settings) == 4
    step(sessions, store, settings)
    assert listed(sessions) == {orphan.sha256: False, late.sha256: False}
    add_scan(sessions, late)  # a transaction that was under way
    wait(sessions, settings.orphan_days * 24 * 3600)
    step(sessions, store, settings)
    wait(sessions)
    step(sessions, store, settings)
    assert [is_readable(store, blob) for blob in (needed, orphan, late)] == [True, False, True]
    assert listed(sessions) == {}


def test_what_was_set_aside_and_is_on_no_list_is_put_back_or_deleted(
    sessions: Sessions, store: BlobStore, settings: Settings
) -> None:
    """As after a restored backup of the database."""
    needed, orphan = store.put(io.BytesIO(b"needed")), store.put(io.BytesIO(b"orphan"))
    add_scan(sessions, needed)
    for blob in (needed, orphan):
        store.set_aside(blob.sha256)
    sweep(sessions, store, settings)
    wait(sessions, settings.orphan_days * 24 * 3600)
    step(sessions, store, settings)
    assert not is_readable(store, orphan)
    assert is_readable(store, needed)


def test_half_written_files_of_dead_processes_are_removed(sessions: Sessions, settings: Settings) -> None:
    folder = Path(settings.artifacts) / "incoming"
    folder.mkdir(parents=True)
    for name in ("old", "new"):
        (folder / name).write_bytes(PICTURE)
    os.utime(folder / "old", (0, 0))
    sweep(sessions, BlobStore(settings.artifacts), settings)
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_orphans_are_kept_where_the_setting_says_so(sessions: Sessions, settings: Settings) -> None:
    store = BlobStore(settings.artifacts)
    store.put(io.BytesIO(PICTURE))
    sweep(sessions, store, settings.model_copy(update={"orphan_days": 0}))
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(ReleasedBlob)) == 0
