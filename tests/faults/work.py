"""What the cases give their workers to do: scans whose first word says what happens to them, and a model for them."""

import hashlib
import uuid
from collections import Counter
from collections.abc import Sequence
from io import BytesIO

from sqlalchemy import insert, select, text

from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.states import JobKind, Lane
from jobs.storage.blobs import BlobStore
from jobs.tables import Dataset, Job, JobEvent, ModelVersion, Scan, ScanResult, Unit, new_id
from tests import builders
from tests.builders import TENANT
from tests.jobs.checker import faults
from tests.processes import Stack

HALF_TUMOR = ("normal", "tumor")


def words(number: int, **special: int) -> list[str]:
    """So many good scans; `poison=4` makes the one at ordinal 4 a poison scan."""
    listed = [HALF_TUMOR[ordinal % 2] for ordinal in range(number)]
    for word, ordinal in special.items():
        listed[ordinal] = word
    return listed


def batch(processes: Stack, scans: Sequence[str], chunk: int = 10, tenant_id: str = TENANT) -> uuid.UUID:
    """A batch of such scans, submitted."""
    return _predict(processes, JobKind.PREDICT_BATCH, scans, chunk, tenant_id)


def single(processes: Stack, word: str = "tumor", tenant_id: str = TENANT) -> uuid.UUID:
    """One urgent scan, submitted."""
    return _predict(processes, JobKind.PREDICT, [word], 1, tenant_id)


def training(processes: Stack, epochs: int = 3, **params: object) -> uuid.UUID:
    """A training, submitted."""
    blob = BlobStore(processes.settings.artifacts).put(BytesIO(b"a zip"))
    with processes.sessions.begin() as session:
        dataset = builders.make_dataset(session)
        session.get_one(Dataset, dataset.id).archive_sha256 = blob.sha256
        params = {"epochs": epochs, "weights": "none", **params}
        new = NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params=params, dataset_id=dataset.id)
        return submit(session, new).id


def champion(processes: Stack, tenant_id: str = TENANT) -> ModelVersion:
    """The tenant's champion, made where there is none; its weights are a few bytes, which the stub takes."""
    with processes.sessions.begin() as session:
        found = session.scalar(select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.champion))
        if found is not None:
            return found
        blob = BlobStore(processes.settings.artifacts).put(BytesIO(b"weights"))
        job = builders.make_job(session, tenant_id=tenant_id)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel(blob.sha256, ["Normal", "Tumor"], {"epochs": 2}, builders.SCORES, "d" * 64, "abc123")
        made = promotion.register(session, held, new, GatePolicy())
        lifecycle.succeed(session, held, metrics={"accuracy": 0.97, "f1": 0.97})
        return made


def _predict(processes: Stack, kind: JobKind, scans: Sequence[str], chunk: int, tenant_id: str) -> uuid.UUID:
    model = champion(processes, tenant_id)
    stored = _stored(processes, scans, tenant_id)
    results = [NewResult(scan_id, name=f"{ordinal}.png") for ordinal, scan_id in enumerate(stored)]
    new = NewJob(tenant_id, kind, builders.LANES[kind], model_id=model.id, model_version=model.version)
    with processes.sessions.begin() as session:
        return submit(session, new, results, chunk).id


def _stored(processes: Stack, words: Sequence[str], tenant_id: str) -> list[uuid.UUID]:
    """Scans that differ by their hash, since equal ones are looked at once; the same ones for each batch.

    Ten thousand files are one file for each word, under many names: the store takes a hash at its word.
    """
    store, here = BlobStore(processes.settings.artifacts), processes.settings.home
    origins = {word: store.fetch(store.put(BytesIO(word.encode())).sha256, here) for word in set(words)}
    names = [hashlib.sha256(f"{word} {ordinal}".encode()).hexdigest() for ordinal, word in enumerate(words)]
    with processes.sessions.begin() as session:
        known = {
            row.sha256: row.id for row in session.execute(select(Scan.sha256, Scan.id).filter_by(tenant_id=tenant_id))
        }
        new = {name: new_id() for name in names if name not in known}
        common = {"tenant_id": tenant_id, "size": 1000, "media_type": "image/png", "width": 512, "height": 512}
        if new:
            session.execute(insert(Scan), [{**common, "id": id, "sha256": name} for name, id in new.items()])
    for word, name in zip(words, names, strict=True):
        path = store.fetch(name, here)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.hardlink_to(origins[word])
    ids = {**known, **new}
    return [ids[name] for name in names]


# --- what came of it ---


def wrong(processes: Stack, ended: bool = True) -> list[str]:
    """The checker's word."""
    with processes.sessions() as session:
        return faults(session, ended)


def labels(processes: Stack, job_id: uuid.UUID) -> list[str | None]:
    """The job's labels in the order of its scans; None where there is no result."""
    with processes.sessions() as session:
        rows = session.scalars(select(ScanResult).where(ScanResult.job_id == job_id).order_by(ScanResult.ordinal))
        return [row.label for row in rows]


def expected(scans: Sequence[str]) -> list[str | None]:
    """The labels that such scans get."""
    return [{"normal": "Normal", "tumor": "Tumor", "pause": None}.get(word) for word in scans]


def attempts(processes: Stack, job_id: uuid.UUID) -> list[int]:
    """How often each unit was claimed, first unit first."""
    return [unit.attempt for unit in units(processes, job_id)]


def units(processes: Stack, job_id: uuid.UUID) -> list[Unit]:
    """The job's units, first first."""
    with processes.sessions() as session:
        return builders.units_of(session, session.get_one(Job, job_id))


def events(processes: Stack, job_id: uuid.UUID, type_: str) -> list[JobEvent]:
    """The job's events of a type, oldest first."""
    with processes.sessions() as session:
        found = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type_).order_by(JobEvent.id)
        return list(session.scalars(found))


def held(processes: Stack, job_id: uuid.UUID) -> bool:
    """Whether a worker holds a unit of the job."""
    return any(unit.state == "running" for unit in units(processes, job_id))


def tally(processes: Stack, job_id: uuid.UUID) -> Counter[str]:
    """How many scans of the job are in which state."""
    with processes.sessions() as session:
        rows = session.execute(text("SELECT state FROM scan_results WHERE job_id = :id"), {"id": job_id})
        return Counter(rows.scalars())
