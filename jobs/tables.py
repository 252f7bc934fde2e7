"""The tables. "Tables", because a model here is a network.

What a CHECK, an index or a trigger can forbid is forbidden there; the triggers are in the migrations. Every row that
belongs to somebody carries `tenant_id`.
"""

import datetime as dt
import uuid
from enum import StrEnum
from typing import Any

import uuid_utils
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Sequence,
    String,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.states import (
    TERMINAL,
    UNIT_TERMINAL,
    DatasetState,
    JobKind,
    JobState,
    Lane,
    ResultState,
    UnitState,
)

Json = dict[str, Any]
FENCE = Sequence("unit_fence_seq", metadata=Base.metadata)
"""Each claim takes the next number. A later write must name the number of its claim."""


def new_id() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): ordered by time, so that keys page and index well."""
    return uuid.UUID(bytes=uuid_utils.uuid7().bytes)


def _one_of(column: str, words: type[StrEnum] | frozenset[Any]) -> str:
    return f"{column} IN ({', '.join(sorted(repr(str(word)) for word in words))})"


def _id() -> Mapped[uuid.UUID]:
    return mapped_column(Uuid, primary_key=True, default=new_id)


def _tenant() -> Mapped[str]:
    return mapped_column(String(63), index=True)


def _now() -> Mapped[dt.datetime]:
    return mapped_column(DateTime(timezone=True), server_default=func.clock_timestamp())


def _time() -> Mapped[dt.datetime | None]:
    return mapped_column(DateTime(timezone=True))


def _count() -> Mapped[int]:
    return mapped_column(Integer, server_default="0", default=0)


class ApiKey(Base):
    """A key; only its SHA-256 is kept. A secret of 256 random bits needs no slow hash."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str] = mapped_column(String(200))
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(12))  # the first letters, for people to tell keys apart
    scopes: Mapped[list[str]] = mapped_column(ARRAY(String(40)))
    created_at: Mapped[dt.datetime] = _now()
    revoked_at: Mapped[dt.datetime | None] = _time()


class Dataset(Base):
    """An uploaded zip of labelled scans, one folder a class."""

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint(_one_of("state", DatasetState), name="state"),
        CheckConstraint("(state = 'ready') <= (digest IS NOT NULL)", name="ready_has_digest"),
    )

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str] = mapped_column(String(200))
    state: Mapped[str] = mapped_column(String(20), default=DatasetState.CHECKING)
    archive_sha256: Mapped[str] = mapped_column(String(64))
    archive_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str | None] = mapped_column(String(64))  # of what is in it, whatever the zip's packing
    classes: Mapped[dict[str, int] | None] = mapped_column(JSONB)
    problems: Mapped[list[str]] = mapped_column(JSONB, default=list, server_default="[]")
    report: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # {"inspection": {...}, "warnings": [...]}
    job_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    created_at: Mapped[dt.datetime] = _now()


class Scan(Base):
    """One stored image or DICOM file. The same bytes of one tenant are stored once."""

    __tablename__ = "scans"
    __table_args__ = (Index("uq_scans_tenant_id_sha256", "tenant_id", "sha256", unique=True),)

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(40))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[dt.datetime] = _now()


class Upload(Base):
    """A file that comes in pieces. How much of it is here is its file's length, and nowhere else."""

    __tablename__ = "uploads"
    __table_args__ = (CheckConstraint("size >= 0", name="size"),)

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    size: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str | None] = mapped_column(String(500))
    created_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp(), index=True
    )


class ModelVersion(Base):
    """What a successful training made. At most one a tenant is champion: the partial index says so."""

    __tablename__ = "model_versions"
    __table_args__ = (
        Index("uq_model_versions_tenant_id_version", "tenant_id", "version", unique=True),
        Index("uq_model_versions_champion", "tenant_id", unique=True, postgresql_where=text("champion")),
    )

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    version: Mapped[int] = mapped_column(Integer)
    champion: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), unique=True)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id", ondelete="SET NULL"))
    dataset_digest: Mapped[str | None] = mapped_column(String(64))
    weights_sha256: Mapped[str] = mapped_column(String(64))
    classes: Mapped[list[str]] = mapped_column(JSONB)
    params: Mapped[Json] = mapped_column(JSONB)
    metrics: Mapped[Json] = mapped_column(JSONB)
    gate: Mapped[Json] = mapped_column(JSONB)  # {"promoted": bool, "reasons": [...]}
    code_revision: Mapped[str | None] = mapped_column(String(64))
    environment: Mapped[Json] = mapped_column(JSONB, default=dict)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_version: Mapped[str | None] = mapped_column(String(20))  # its number in MLflow's registry, once it is there
    reference: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # its test scans; see jobs/drift.py
    created_at: Mapped[dt.datetime] = _now()
    promoted_at: Mapped[dt.datetime | None] = _time()


class ModelEvaluation(Base):
    """A version's scores on one set of test scans: its own, and those of later trainings that it was compared on."""

    __tablename__ = "model_evaluations"

    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    test_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    scans: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[Json] = mapped_column(JSONB)
    created_at: Mapped[dt.datetime] = _now()


class How(StrEnum):
    """What made a version the champion."""

    GATE = "gate"  # the gate at its training's end
    REQUEST = "request"  # somebody asked, and the gate agreed
    FORCE = "force"  # somebody decided against the gate, and said why
    ROLLBACK = "rollback"


class Promotion(Base):
    """A change of the champion: who, when, why. Append-only (a trigger); the latest one is in force.

    `back_id` is the promotion that a rollback returns to; a rollback takes over that of the one it returned to, so
    that the next rollback goes one further back.
    """

    __tablename__ = "promotions"
    __table_args__ = (
        CheckConstraint(_one_of("how", How), name="how"),
        CheckConstraint("(how <> 'force') OR (reason IS NOT NULL)", name="force_has_reason"),
        Index("ix_promotions_tenant_id_id", "tenant_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id"))
    version: Mapped[int] = mapped_column(Integer)
    replaced: Mapped[int | None] = mapped_column(Integer)  # the version that was champion before
    back_id: Mapped[int | None] = mapped_column(ForeignKey("promotions.id"))
    how: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(Text)
    verdict: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # the gate's: {"promoted", "reasons"}
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at: Mapped[dt.datetime] = _now()


class RegistryMirror(Base):
    """How far MLflow's registry has followed a tenant's promotions."""

    __tablename__ = "registry_mirrors"

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    promotion_id: Mapped[int] = mapped_column(BigInteger)


class Job(Base):
    """One request for work. `revision` grows with every change (a trigger), and is the ETag."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("kind", JobKind), name="kind"),
        CheckConstraint(_one_of("lane", Lane), name="lane"),
        CheckConstraint(_one_of("state", JobState), name="state"),
        CheckConstraint(f"({_one_of('state', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_is_terminal"),
        CheckConstraint("succeeded + failed + cancelled <= total", name="counts"),
        CheckConstraint("progress >= 0 AND progress <= 1", name="progress"),
        Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
        # The dispatcher's way to work, and the way to a place in the queue: history costs them nothing.
        Index("ix_jobs_unfinished", "lane", "tenant_id", "id", postgresql_where=text("finished_at IS NULL")),
        # One key of a client makes one job, and one job is retried as one: whatever the API's processes do.
        Index(
            "uq_jobs_tenant_id_idempotency_key",
            "tenant_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index("uq_jobs_retry_of", "retry_of", unique=True, postgresql_where=text("retry_of IS NOT NULL")),
        # A job that is deleted looks for its reproductions by this.
        Index("ix_jobs_reproduction_of", "reproduction_of", postgresql_where=text("reproduction_of IS NOT NULL")),
        Index(
            "ix_jobs_unexpired",
            "finished_at",
            postgresql_where=text("kind IN ('predict', 'predict_batch') AND results_expired_at IS NULL"),
        ),
        Index("ix_jobs_untracked", "id", postgresql_where=text("kind = 'train' AND tracked_at IS NULL")),
        Index(
            "ix_jobs_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
        ),
    )

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(20))
    lane: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20), default=JobState.QUEUED)
    revision: Mapped[int] = mapped_column(BigInteger, default=1, server_default="1")
    name: Mapped[str | None] = mapped_column(String(200))
    params: Mapped[Json] = mapped_column(JSONB, default=dict)
    labels: Mapped[Json] = mapped_column("metadata", JSONB, default=dict)  # `metadata` is SQLAlchemy's own word
    source_url: Mapped[str | None] = mapped_column(Text)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id", ondelete="SET NULL"), index=True)
    model_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # pinned at submit, or made by this training
    model_version: Mapped[int | None] = mapped_column(Integer)
    base_model_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # what a training begins from: weights: version:N
    promote: Mapped[str] = mapped_column(String(10), default="auto", server_default="auto")
    cancel_requested_at: Mapped[dt.datetime | None] = _time()
    stage: Mapped[str | None] = mapped_column(String(40))
    stages: Mapped[list[Json]] = mapped_column(JSONB, default=list, server_default="[]")
    progress: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    attempt: Mapped[int] = _count()
    total: Mapped[int] = _count()
    succeeded: Mapped[int] = _count()
    failed: Mapped[int] = _count()
    cancelled: Mapped[int] = _count()
    metrics: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    device_seconds: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    engines: Mapped[list[str]] = mapped_column(ARRAY(String(40)), default=list, server_default="{}")  # of its results
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    tracked_at: Mapped[dt.datetime | None] = _time()  # when MLflow had all of an ended training
    idempotency_key: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of the client's header, for a day
    retry_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    reproduction_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    reproduction: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # see jobs/reproduction.py
    created_by: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    created_at: Mapped[dt.datetime] = _now()
    started_at: Mapped[dt.datetime | None] = _time()
    finished_at: Mapped[dt.datetime | None] = _time()
    results_expired_at: Mapped[dt.datetime | None] = _time()  # when a prediction's results were deleted


class Unit(Base):
    """What one worker claims at a time. A running unit is leased to the holder of its `fence`."""

    __tablename__ = "units"
    __table_args__ = (
        CheckConstraint(_one_of("state", UnitState), name="state"),
        CheckConstraint(_one_of("lane", Lane), name="lane"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="running_is_leased"),
        CheckConstraint(
            f"({_one_of('state', UNIT_TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_is_terminal"
        ),
        Index("uq_units_job_id_ordinal", "job_id", "ordinal", unique=True),
        # The dispatcher's and the reaper's whole view: what waits of one job, what is rung, what runs.
        Index("ix_units_unfinished", "job_id", "ordinal", postgresql_where=text("finished_at IS NULL")),
        Index("ix_units_rung", "lane", postgresql_where=text("state = 'dispatched'")),
        Index("ix_units_leased", "lease_expires_at", postgresql_where=text("state = 'running'")),
        # How long a lane's latest units took: the ETA of what waits, and how far ahead to ring.
        Index("ix_units_succeeded", "lane", "finished_at", postgresql_where=text("state = 'succeeded'")),
    )

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    ordinal: Mapped[int] = mapped_column(Integer)
    lane: Mapped[str] = mapped_column(String(20))
    scans: Mapped[int] = mapped_column(Integer, default=1, server_default="1")  # its share of a lane, in scans
    explains: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # the unit whose results it explains; else it predicts
    state: Mapped[str] = mapped_column(String(20), default=UnitState.QUEUED)
    attempt: Mapped[int] = _count()
    failures: Mapped[int] = _count()
    rings: Mapped[int] = _count()
    fence: Mapped[int | None] = mapped_column(BigInteger)
    worker: Mapped[str | None] = mapped_column(String(200))
    not_before: Mapped[dt.datetime] = _now()
    dispatched_at: Mapped[dt.datetime | None] = _time()
    started_at: Mapped[dt.datetime | None] = _time()
    lease_expires_at: Mapped[dt.datetime | None] = _time()
    progress_at: Mapped[dt.datetime | None] = _time()
    yield_requested_at: Mapped[dt.datetime | None] = _time()  # somebody with a better right waits for this worker
    finished_at: Mapped[dt.datetime | None] = _time()
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))


NOT_SUCCEEDED = frozenset((ResultState.FAILED, ResultState.CANCELLED))


class ScanResult(Base):
    """One scan's place in a prediction job: made with the job as pending, ended exactly once."""

    __tablename__ = "scan_results"
    __table_args__ = (
        CheckConstraint(_one_of("state", ResultState), name="state"),
        CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="finished_is_ended"),
        CheckConstraint("(state = 'succeeded') = (label IS NOT NULL)", name="succeeded_has_label"),
        Index("ix_scan_results_unit_id", "unit_id"),
        # Where a running job's results end for now, and the few that failed, among millions of others.
        Index("ix_scan_results_pending", "job_id", "ordinal", postgresql_where=text("state = 'pending'")),
        # What was computed once need not be again: the latest equal result of a scan is found here.
        Index("ix_scan_results_computed", "scan_id", postgresql_where=text("state = 'succeeded' AND NOT cached")),
        Index(
            "ix_scan_results_not_succeeded",
            "job_id",
            "ordinal",
            postgresql_where=text(_one_of("state", NOT_SUCCEEDED)),
        ),
    )

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    unit_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("units.id", ondelete="CASCADE"))
    scan_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("scans.id"))  # null: it could not be stored
    name: Mapped[str | None] = mapped_column(String(500))
    custom_id: Mapped[str | None] = mapped_column(String(200))
    patient: Mapped[str | None] = mapped_column(String(200))  # the client's own keys, by which it groups results
    study: Mapped[str | None] = mapped_column(String(200))
    source_url: Mapped[str | None] = mapped_column(Text)  # where the worker fetches what is not stored here
    state: Mapped[str] = mapped_column(String(20), default=ResultState.PENDING)
    label: Mapped[str | None] = mapped_column(String(100))
    confidence: Mapped[float | None] = mapped_column(Double)
    probabilities: Mapped[dict[str, float] | None] = mapped_column(JSONB(none_as_null=True))
    engine: Mapped[str | None] = mapped_column(String(40))  # what computed it, such as openvino-bf16
    cached: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")  # taken from an equal result
    disposition: Mapped[str | None] = mapped_column(String(100))  # what may be done with it: see ml/disposition.py
    reason: Mapped[str | None] = mapped_column(Text)  # why it is indeterminate or rejected
    ood_score: Mapped[float | None] = mapped_column(Double)  # above 1 it is unlike what the network has learnt from
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    finished_at: Mapped[dt.datetime | None] = _time()


class PredictionCount(Base):
    """How many scans a version predicted on a day (UTC) in one bin of one figure: what drift is reckoned from.

    `what`: an input statistic, `confidence`, `class` or `disposition`; `bin`: a number of the version's reference, or a
    word. Results that were taken over from equal ones are not counted again.
    """

    __tablename__ = "prediction_counts"

    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"), primary_key=True)
    day: Mapped[dt.date] = mapped_column(Date, primary_key=True)
    what: Mapped[str] = mapped_column(String(40), primary_key=True)
    bin: Mapped[str] = mapped_column(String(100), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    scans: Mapped[int] = mapped_column(BigInteger)


class Truth(Base):
    """What a scan turned out to show, told of one of its predictions. Append-only: of one model's, the latest counts.

    It holds what was predicted, so that it outlives the results.
    """

    __tablename__ = "truths"
    __table_args__ = (Index("ix_truths_model_id_scan_id", "model_id", "scan_id", "id"),)

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = _tenant()
    scan_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("scans.id"))
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("model_versions.id", ondelete="CASCADE"))
    label: Mapped[str] = mapped_column(String(100))
    predicted: Mapped[str] = mapped_column(String(100))
    confidence: Mapped[float] = mapped_column(Double)
    disposition: Mapped[str | None] = mapped_column(String(100))
    patient: Mapped[str | None] = mapped_column(String(200))  # the client's own key, as its results have it
    predicted_at: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True))
    by_key: Mapped[uuid.UUID | None] = mapped_column(Uuid)
    at: Mapped[dt.datetime] = _now()


TERMINAL_EVENTS = frozenset(str(state) for state in TERMINAL)
"""A job's last event bears its last state's name."""


class JobEvent(Base):
    """What happened, append-only. A job has exactly one terminal event: the partial index refuses a second."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job_id_id", "job_id", "id"),
        Index(
            "uq_job_events_terminal",
            "job_id",
            unique=True,
            postgresql_where=text(_one_of("type", TERMINAL_EVENTS)),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[Json] = mapped_column(JSONB, default=dict)
    at: Mapped[dt.datetime] = _now()


class Artifact(Base):
    """A named blob of a job."""

    __tablename__ = "artifacts"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[dt.datetime] = _now()


class Checkpoint(Base):
    """A training's state after an epoch, in the store of artifacts. Path and row carry the fence of its writer."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("ix_checkpoints_job_id", "job_id"),)

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    fence: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(Text)  # within the store
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[dt.datetime] = _now()


class TenantLoad(Base):
    """What a tenant has in the queue: kept by the verbs that submit and end jobs, so that a quota costs one row."""

    __tablename__ = "tenant_loads"
    __table_args__ = (CheckConstraint("scans >= 0 AND batches >= 0", name="counts"),)

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    scans: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # of jobs that have not ended
    batches: Mapped[int] = mapped_column(Integer, default=0, server_default="0")  # batches that have not ended


class IdempotencyKey(Base):
    """A client's Idempotency-Key: what it was sent with, and the first answer once there is one."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))  # of the request: method, path, fields and files
    status: Mapped[int | None] = mapped_column(Integer)  # null: the first request has not been answered yet
    headers: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    body: Mapped[str | None] = mapped_column(Text)
    made_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # what the request has made, or changed, that is no job
    created_at: Mapped[dt.datetime] = _now()
    locked_at: Mapped[dt.datetime] = _now()


class Process(Base):
    """A worker's or dispatcher's sign of life. It belongs to no tenant: all of them are served by it."""

    __tablename__ = "processes"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    lanes: Mapped[list[str]] = mapped_column(ARRAY(String(20)), default=list)
    broker_reachable: Mapped[bool] = mapped_column(Boolean, default=False)
    seen_at: Mapped[dt.datetime] = _now()


class Webhook(Base):
    """Where a tenant wants to hear of events. The secret signs each delivery (Standard Webhooks), so it is kept."""

    __tablename__ = "webhooks"

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = _tenant()
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(ARRAY(String(40)))
    secret: Mapped[str] = mapped_column(String(100))
    tried_at: Mapped[dt.datetime | None] = _time()  # who was tried longest ago is served first
    created_at: Mapped[dt.datetime] = _now()


class DeliveryState(StrEnum):
    """`pending` until an address has answered 2xx, or has been tried for long enough."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(Base):
    """One event on its way to one webhook: written in the transaction of the event, sent by the dispatcher."""

    __tablename__ = "deliveries"
    __table_args__ = (
        CheckConstraint(_one_of("state", DeliveryState), name="state"),
        Index("uq_deliveries_webhook_id_event_id", "webhook_id", "event_id", unique=True),
        Index("ix_deliveries_pending", "next_at", postgresql_where=text("state = 'pending'")),
    )

    id: Mapped[uuid.UUID] = _id()
    tenant_id: Mapped[str] = mapped_column(String(63))
    webhook_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(String(80))  # the same for every webhook that hears of the event
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[Json] = mapped_column(JSONB)  # ids and states, nothing of the patient
    state: Mapped[str] = mapped_column(String(20), default=DeliveryState.PENDING, server_default="pending")
    attempts: Mapped[int] = _count()
    status: Mapped[int | None] = mapped_column(Integer)  # of the latest answer
    error: Mapped[str | None] = mapped_column(String(200))
    next_at: Mapped[dt.datetime] = _now()
    created_at: Mapped[dt.datetime] = _now()
    ended_at: Mapped[dt.datetime | None] = _time()
