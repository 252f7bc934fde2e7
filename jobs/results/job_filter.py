"""Filters of lists of jobs."""

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, cast, exists, or_
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import InstrumentedAttribute

from jobs.states import JobKind, JobState
from jobs.tables import Job, ScanResult
from jobs.tables.columns import first_id
from ml.spec.pipeline import IMAGE


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list. `metadata` holds strings of a query string: `1` matches the number and the text. `custom_id`:
    those that have a result with this id of the client's."""

    state: str | None = None
    kind: str | None = None
    pipeline: str | None = None
    created_after: dt.datetime | None = None
    metadata: dict[str, str] | None = None
    custom_id: str | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether an index of something else than the order of jobs finds them."""
        return bool(self.metadata or self.custom_id)

    @property
    def order(self) -> list[InstrumentedAttribute[Any]]:
        """The order of an index of these jobs. What most jobs are (succeeded, predict, image) is in no index of it."""
        if self.is_narrow:
            return [Job.id]
        if self.state not in (None, JobState.SUCCEEDED):
            return [Job.tenant_id, Job.state, Job.id]
        if self.kind not in (None, JobKind.PREDICT):
            return [Job.tenant_id, Job.kind, Job.id]
        if self.pipeline not in (None, IMAGE):
            return [Job.tenant_id, Job.pipeline, Job.id]
        return [Job.tenant_id, Job.id]

    @property
    def first_id(self) -> uuid.UUID:
        """A lower bound of their ids. Ids follow the clocks of the API's processes, which may be wrong by a day."""
        return first_id(self.created_after.timestamp() - 24 * 3600 if self.created_after else 0.0)

    def clauses(self) -> list[ColumnElement[bool]]:
        """The filter in SQL."""
        found: list[ColumnElement[bool]] = []
        if self.state:
            found.append(Job.state == self.state)
        if self.kind:
            found.append(Job.kind == self.kind)
        if self.pipeline:
            found.append(Job.pipeline == self.pipeline)
        if self.created_after:
            found.append(Job.created_at > self.created_after)
        if self.custom_id:
            # With the tenant, by which the index begins.
            mine = ScanResult.tenant_id == Job.tenant_id, ScanResult.job_id == Job.id
            found.append(exists().where(*mine, ScanResult.custom_id == self.custom_id))
        return found + [_has_label(key, value) for key, value in (self.metadata or {}).items()]


def _has_label(key: str, value: str) -> ColumnElement[bool]:
    return or_(*(Job.labels.contains(cast({key: reading}, JSONB)) for reading in _readings(value)))


def _readings(value: str) -> list[Any]:
    """The JSON values that a string of a query may stand for: itself, and a boolean or number of that spelling."""
    if value in ("true", "false"):
        return [value, value == "true"]
    try:
        number = float(value)
    except ValueError:
        return [value]
    # JSON has no NaN and no infinity.
    return [value, int(number) if number.is_integer() else number] if abs(number) < 1e15 else [value]
