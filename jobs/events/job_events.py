"""A job's event log, and the NOTIFY channels of units and jobs."""

import re
import uuid

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from jobs.tables import JobEvent, Json

UNITS_CHANNEL = "renalq_units"
"""NOTIFY channel of the dispatcher. The payload is the `place` of new claimable units, or one of these words; an empty
one comes from processes of older releases."""
PLACE = re.compile(r"(?P<job>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})(/(?P<ordinal>[0-9]{1,9}))?")
UNIT_ENDED = "ended"
"""Payload on this channel: a worker is idle."""
CANCELLATION = "cancellation"
"""Payload on this channel: units of a cancelled job are left for the leader to end."""
JOBS_CHANNEL = "renalq_jobs"
"""NOTIFY channel: a job changed in what clients see, or has a new event; the payload is its id. Sent by triggers."""


def record(session: Session, job_id: uuid.UUID, tenant_id: str, type_: str, data: Json) -> None:
    """Append an event to the job's log."""
    session.execute(insert(JobEvent).values(job_id=job_id, tenant_id=tenant_id, type=type_, data=data))


def place(job_id: object, ordinal: int = 0) -> str:
    """Where new claimable units are: the job, and the lowest of their ordinals. Older releases know the job alone."""
    return f"{job_id}/{ordinal}" if ordinal else str(job_id)


def wake_dispatcher(session: Session, payload: str) -> None:
    """Notify the dispatcher at commit. `payload`: see `UNITS_CHANNEL`."""
    session.execute(select(func.pg_notify(UNITS_CHANNEL, payload)))
