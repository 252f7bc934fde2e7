"""The words that jobs, units and results are described in, and the moves that are legal.

Every state is one lower-case word of text, the same in Postgres, in JSON and in Python. `jobs/tables` turns
`TERMINAL` and `Lane` into CHECK constraints, so that the database refuses what is not written here.
"""

from enum import StrEnum


class JobKind(StrEnum):
    """What a job does. The worker chooses its task by this word."""

    TRAIN = "train"
    PREDICT = "predict"  # one scan, somebody waits for it
    PREDICT_BATCH = "predict_batch"
    INGEST = "ingest"  # check an uploaded dataset


PREDICTIONS = (JobKind.PREDICT, JobKind.PREDICT_BATCH)
"""Kinds of jobs that have a result for each scan."""


class Lane(StrEnum):
    """A Celery queue. Workers subscribe to lanes, so that long work never stands before urgent work."""

    URGENT = "urgent"
    BATCH = "batch"
    TRAIN = "train"


class JobState(StrEnum):
    """A job's state. "Cancel requested" is a column, not a state: the work may still end in any of four ways."""

    QUEUED = "queued"  # → running when a worker claims its first unit; → cancelled by the API
    RUNNING = "running"  # → one of the four below when its last unit has ended
    SUCCEEDED = "succeeded"
    PARTIALLY_SUCCEEDED = "partially_succeeded"  # a batch in which some scans failed or were cancelled
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnitState(StrEnum):
    """A unit is what one worker claims at a time: a whole training, or a chunk of a batch."""

    QUEUED = "queued"  # → dispatched by the dispatcher; → running by a worker; → cancelled by the API
    DISPATCHED = "dispatched"  # its doorbell was rung; → running by a worker; rung again when nobody comes
    RUNNING = "running"  # leased; → succeeded/failed/cancelled by its worker; → queued when the lease is lost
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ResultState(StrEnum):
    """One scan's place in a prediction job."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # a broken scan is a row with its own error, never a failed job
    CANCELLED = "cancelled"


class DatasetState(StrEnum):
    CHECKING = "checking"  # → ready | invalid by its ingest job
    READY = "ready"
    INVALID = "invalid"


class Stage(StrEnum):
    """The four stages of a training, in order (document 000)."""

    DATA_INGESTION = "data_ingestion"
    PREPARE_BASE_MODEL = "prepare_base_model"
    TRAINING = "training"
    EVALUATION = "evaluation"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.PARTIALLY_SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
UNIT_TERMINAL = frozenset({UnitState.SUCCEEDED, UnitState.FAILED, UnitState.CANCELLED})
CLAIMABLE = (UnitState.QUEUED, UnitState.DISPATCHED)

TRANSITIONS: dict[UnitState, frozenset[UnitState]] = {
    UnitState.QUEUED: frozenset({UnitState.DISPATCHED, UnitState.RUNNING, UnitState.CANCELLED}),
    UnitState.DISPATCHED: frozenset({UnitState.DISPATCHED, UnitState.QUEUED, UnitState.RUNNING, UnitState.CANCELLED}),
    UnitState.RUNNING: frozenset({UnitState.SUCCEEDED, UnitState.FAILED, UnitState.CANCELLED, UnitState.QUEUED}),
    UnitState.SUCCEEDED: frozenset(),
    UnitState.FAILED: frozenset(),
    UnitState.CANCELLED: frozenset(),
}
"""The legal moves of a unit. A trigger in Postgres refuses any other (see `jobs/tables`)."""
