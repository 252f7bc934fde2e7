"""The tables, one file per aggregate. They are not called models, because a model here is a trained network.

Invariants are enforced by CHECK constraints, unique indexes and triggers where possible; the triggers are in the
migrations. Every row that belongs to a tenant has `tenant_id`.
"""

from jobs.tables.blob import ReleasedBlob
from jobs.tables.columns import Json, new_id
from jobs.tables.count import JobCount, RequestCount, StorageChange, UnitCount
from jobs.tables.dataset import Dataset
from jobs.tables.deletion import Deletion, DeletionKind, ReleasedRun
from jobs.tables.job import (
    IS_CANCELLING,
    IS_QUEUED,
    TERMINAL_EVENTS,
    Artifact,
    Checkpoint,
    Job,
    JobEvent,
    TenantLoad,
)
from jobs.tables.key import ApiKey, IdempotencyKey
from jobs.tables.model import (
    ModelEvaluation,
    ModelVersion,
    OperatingPointChange,
    PredictionCount,
    Promotion,
    PromotionMethod,
    RegistryMirror,
    StudyCount,
    Truth,
)
from jobs.tables.process import Process
from jobs.tables.result import NOT_SUCCEEDED, ScanResult
from jobs.tables.scan import Scan, Upload
from jobs.tables.unit import Unit
from jobs.tables.webhook import Delivery, DeliveryState, JobWebhook, Webhook

__all__ = [
    "IS_CANCELLING",
    "IS_QUEUED",
    "NOT_SUCCEEDED",
    "TERMINAL_EVENTS",
    "ApiKey",
    "Artifact",
    "Checkpoint",
    "Dataset",
    "Deletion",
    "DeletionKind",
    "Delivery",
    "DeliveryState",
    "IdempotencyKey",
    "Job",
    "JobCount",
    "JobEvent",
    "JobWebhook",
    "Json",
    "ModelEvaluation",
    "ModelVersion",
    "OperatingPointChange",
    "PredictionCount",
    "Process",
    "Promotion",
    "PromotionMethod",
    "RegistryMirror",
    "ReleasedBlob",
    "ReleasedRun",
    "RequestCount",
    "Scan",
    "ScanResult",
    "StorageChange",
    "StudyCount",
    "TenantLoad",
    "Truth",
    "Unit",
    "UnitCount",
    "Upload",
    "Webhook",
    "new_id",
]
