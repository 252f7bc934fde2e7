"""What a webhook's body says beside its event, read when it is sent: so it is the latest, and nothing of it is kept
with the delivery. The client's own names go back to the client; names of files and of patients are never sent."""

import uuid
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.errors import JobNotFound, RenalQError
from jobs.events.deliveries import DueDelivery
from jobs.events.webhooks import EventType
from jobs.results import queries, studies
from jobs.results.links import job_links
from jobs.results.queries import JobView
from jobs.settings import Settings
from jobs.states import PREDICTIONS
from jobs.tables import Json, ScanResult

ROOT = "/v1"
"""What the links begin with; the receiver knows the host."""


class Outdated(Exception):
    """Not sent: the job has ended since."""


def details(session: Session, due: DueDelivery, settings: Settings) -> Json:
    """More fields of `data`. Of a job that was deleted since there is nothing to tell.

    Raises:
        Outdated: it would tell the progress of a job that has ended.
    """
    if "kind" not in due.data:
        version = due.data.get("model_version")
        return {"links": {"self": f"{ROOT}/models/{version}"}} if version else {}
    try:
        view = queries.job(session, due.tenant_id, uuid.UUID(due.data["job_id"]))
    except JobNotFound:
        return {}
    if due.type == EventType.JOB_PROGRESS and view.terminal:
        raise Outdated(Outdated.__doc__)
    return {**_of_client(session, view), "links": job_links(view.job, ROOT), **_so_far(due, view, session, settings)}


def _of_client(session: Session, view: JobView) -> Json:
    """What the client has called its job, and the one scan in it. The ids of a batch's scans are in its results."""
    job, custom_id = view.job, None
    if job.kind in PREDICTIONS and job.total == 1:
        custom_id = session.scalar(select(ScanResult.custom_id).where(ScanResult.job_id == job.id))
    return {"name": job.name, "metadata": job.labels, "custom_id": custom_id}


def _so_far(due: DueDelivery, view: JobView, session: Session, settings: Settings) -> dict[str, Any]:
    if due.type == EventType.JOB_PROGRESS:
        return {"progress": round(view.progress, 4), "eta_seconds": view.eta_seconds, "stage": view.job.stage}
    return _studies(view, session, settings) if view.terminal and view.job.kind in PREDICTIONS else {}


def _studies(view: JobView, session: Session, settings: Settings) -> Json:
    """How many studies of an ended prediction have which disposition; nothing where there are no results, or too many.
    No UID is sent: the receiver asks GET /jobs/ID/studies."""
    try:
        found = studies.dispositions(session, view, settings)
    except RenalQError:
        return {}
    return {} if found is None else {"studies": found}
