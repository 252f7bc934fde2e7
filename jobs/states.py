"""States of jobs, units, results and datasets, and the legal transitions of units.

A state is one lower-case word, the same in Postgres, JSON and Python. `jobs/tables` makes CHECK constraints of these
enums, so that the database refuses any other value.
"""

from enum import StrEnum


class JobKind(StrEnum):
    """What a job does. It decides which Celery task runs it."""

    TRAIN = "train"
    PREDICT = "predict"  # one scan, for a client that waits
    PREDICT_BATCH = "predict_batch"
    INGEST = "ingest"  # check an uploaded dataset


PREDICTIONS = (JobKind.PREDICT, JobKind.PREDICT_BATCH)
"""Kinds of jobs with a result per scan."""


class Lane(StrEnum):
    """A Celery queue. Workers subscribe to lanes, so that long work never delays urgent work."""

    URGENT = "urgent"
    BATCH = "batch"
    TRAIN = "train"


class JobState(StrEnum):
    """A job's state. "Cancel requested" is a column, not a state: the job may still end in any terminal state."""

    QUEUED = "queued"  # → running when a worker claims its first unit; → cancelled by the API
    RUNNING = "running"  # → one of the four below when its last unit ends
    SUCCEEDED = "succeeded"
    PARTIALLY_SUCCEEDED = "partially_succeeded"  # a batch in which some scans failed or were cancelled
    FAILED = "failed"
    CANCELLED = "cancelled"


class UnitState(StrEnum):
    """A unit is what a worker claims at a time: a whole training, or a chunk of a batch."""

    SCHEDULED = "scheduled"  # waits for `not_before` after a failure; → queued by the dispatcher when that is over
    QUEUED = "queued"  # → dispatched by the dispatcher; → running by a worker; → cancelled by the API
    DISPATCHED = "dispatched"  # message sent or unit reserved; → running by a worker; sent again if unclaimed
    RUNNING = "running"  # leased; → succeeded/failed/cancelled by its worker; → queued/scheduled if it is handed back
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ResultState(StrEnum):
    """The state of one scan in a prediction job."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # a broken scan has its own error and does not fail the job
    CANCELLED = "cancelled"


class DatasetState(StrEnum):
    """The state of an uploaded dataset."""

    CHECKING = "checking"  # → ready | invalid by its ingest job
    READY = "ready"
    INVALID = "invalid"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.PARTIALLY_SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
UNIT_TERMINAL = frozenset({UnitState.SUCCEEDED, UnitState.FAILED, UnitState.CANCELLED})
UNCLAIMED = (UnitState.SCHEDULED, UnitState.QUEUED, UnitState.DISPATCHED)
"""States of a unit that waits: no worker holds it."""

TRANSITIONS: dict[UnitState, frozenset[UnitState]] = {
    UnitState.SCHEDULED: frozenset({UnitState.QUEUED, UnitState.CANCELLED}),
    UnitState.QUEUED: frozenset({UnitState.DISPATCHED, UnitState.RUNNING, UnitState.CANCELLED}),
    UnitState.DISPATCHED: frozenset({*UNCLAIMED, UnitState.RUNNING, UnitState.CANCELLED}),
    UnitState.RUNNING: frozenset({UnitState.SCHEDULED, UnitState.QUEUED, *UNIT_TERMINAL}),
    UnitState.SUCCEEDED: frozenset(),
    UnitState.FAILED: frozenset(),
    UnitState.CANCELLED: frozenset(),
}
"""Legal transitions of a unit. A trigger in Postgres refuses all others."""
