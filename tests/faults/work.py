"""What the cases give their workers to do: scans whose first word says what happens to them, and a model for them."""

import uuid
from collections import Counter
from collections.abc import Sequence
from io import BytesIO

from sqlalchemy import select, text

from jobs import lifecycle, registry
from jobs.artifacts import Artifacts
from jobs.registry import NewModel
from jobs.states import JobKind, Lane
from jobs.submission import NewJob, NewResult, submit
from jobs.tables import Dataset, Job, JobEvent, ModelVersion, Scan, ScanResult, Unit
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
    blob = Artifacts(processes.settings.artifacts).put(BytesIO(b"a zip"))
    with processes.sessions.begin() as session:
        dataset = builders.make_dataset(session)
        session.get_one(Dataset, dataset.id).archive_sha256 = blob.sha256
        new = NewJob(TENANT, JobKind.TRAIN, Lane.TRAIN, params={"epochs": epochs, **params}, dataset_id=dataset.id)
        return submit(session, new).id


def champion(processes: Stack, tenant_id: str = TENANT) -> ModelVersion:
    """The tenant's champion, made where there is none; its weights are a few bytes, which the stub takes."""
    with processes.sessions.begin() as session:
        found = session.scalar(select(ModelVersion).where(ModelVersion.tenant_id == tenant_id, ModelVersion.champion))
        if found is not None:
            return found
        blob = Artifacts(processes.settings.artifacts).put(BytesIO(b"weights"))
        job = builders.make_job(session, tenant_id=tenant_id)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel(blob.sha256, ["Normal", "Tumor"], {"epochs": 2}, {"f1": 0.97}, "d" * 64, "abc123")
        made = registry.add(session, held, new, min_f1=0.85)
        lifecycle.succeed(session, held, metrics={"accuracy": 0.97, "f1": 0.97})
        return made


def _predict(processes: Stack, kind: JobKind, scans: Sequence[str], chunk: int, tenant_id: str) -> uuid.UUID:
    model = champion(processes, tenant_id)
    stored = _stored(processes, set(scans), tenant_id)
    results = [NewResult(stored[word], name=f"{ordinal}.png") for ordinal, word in enumerate(scans)]
    new = NewJob(tenant_id, kind, builders.LANES[kind], model_id=model.id, model_version=model.version)
    with processes.sessions.begin() as session:
        return submit(session, new, results, chunk).id


def _stored(processes: Stack, contents: set[str], tenant_id: str) -> dict[str, uuid.UUID]:
    """The same bytes are one scan, which may stand in a batch ten thousand times."""
    store = Artifacts(processes.settings.artifacts)
    blobs = {word: store.put(BytesIO(word.encode())).sha256 for word in contents}
    with processes.sessions.begin() as session:
        rows = session.execute(select(Scan.sha256, Scan.id).where(Scan.tenant_id == tenant_id)).all()
        known = {row.sha256: row.id for row in rows}
        return {
            word: known.get(sha256) or builders.make_scan(session, tenant_id, sha256).id
            for word, sha256 in blobs.items()
        }


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
