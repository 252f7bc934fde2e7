"""A job's events, and the two NOTIFY channels."""

import uuid

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from jobs.tables import JobEvent, Json

UNITS_CHANNEL = "renalq_units"
"""NOTIFY channel: a unit waits for the dispatcher, or a worker is done with one."""


JOBS_CHANNEL = "renalq_jobs"
"""NOTIFY channel: the job whose id is the payload has changed. A trigger sends it."""


def record(session: Session, job_id: uuid.UUID, tenant_id: str, type_: str, data: Json) -> None:
    """Append an event."""
    session.execute(insert(JobEvent).values(job_id=job_id, tenant_id=tenant_id, type=type_, data=data))


def wake_dispatcher(session: Session) -> None:
    """Ring the dispatcher at commit."""
    session.execute(select(func.pg_notify(UNITS_CHANNEL, "")))
