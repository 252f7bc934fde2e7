"""`job.progress`: for each running job that somebody listens to, one delivery that is sent again and again.

Its row (unique per webhook and job) is renewed once it was sent, `EVERY_SECONDS` have passed and the job has gone on.
While a receiver does not answer nothing piles up, and what is sent next is the latest.
"""

from typing import Any

from sqlalchemy import Float, cast, func, literal, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.events.webhooks import EventType, notify_sender
from jobs.tables import Delivery, DeliveryState, new_id

EVERY_SECONDS = 5.0
"""A webhook hears of a job's progress once in so many seconds at most."""
MOST = 500
"""Deliveries of one batch."""

# A single scan is not followed: it is done in a moment. The counters tell the progress of a batch, as in
# `jobs.results.queries`.
DUE = text("""
WITH listening AS MATERIALIZED (
    SELECT id, tenant_id, kinds, of_jobs FROM webhooks WHERE 'job.progress' = ANY (events)
), running AS MATERIALIZED (
    SELECT id, tenant_id, kind, CASE WHEN kind = 'predict_batch'
        THEN greatest(progress, (succeeded + failed + cancelled)::float8 / total) ELSE progress END AS progress
    FROM jobs WHERE tenant_id IN (SELECT tenant_id FROM listening) AND state = 'running' AND kind <> 'predict'
), wanted AS (
    SELECT running.*, listening.id AS webhook_id FROM running JOIN listening ON NOT of_jobs
        AND listening.tenant_id = running.tenant_id AND (kinds IS NULL OR kind = ANY (kinds))
    UNION ALL
    SELECT running.*, listening.id FROM running JOIN job_webhooks ON job_webhooks.job_id = running.id
        AND 'job.progress' = ANY (job_webhooks.events) JOIN listening ON listening.id = webhook_id
)
SELECT wanted.id AS job_id, wanted.tenant_id, wanted.kind, wanted.progress, wanted.webhook_id
FROM wanted LEFT JOIN deliveries ON deliveries.webhook_id = wanted.webhook_id AND deliveries.job_id = wanted.id
    AND deliveries.type = 'job.progress'
WHERE progress > 0 AND (deliveries.id IS NULL
    OR deliveries.state <> 'pending' AND deliveries.created_at <= clock_timestamp() - make_interval(secs => :every)
        AND (deliveries.data ->> 'progress')::float8 < progress)
LIMIT :most
""")


def emit_progress(session: Session, every: float = EVERY_SECONDS) -> bool:
    """Write what is due, and notify the sender. True: there is more."""
    due = session.execute(DUE, {"every": every, "most": MOST}).all()
    for row in due:
        session.execute(_renewed(row, every))
    if due:
        notify_sender(session)
    return len(due) == MOST


def _renewed(row: Any, every: float) -> Any:
    """One row's statement, which checks again: two leaders may overlap for a moment."""
    moment = func.to_char(func.extract("epoch", NOW), "FM999999999990.000")
    fresh = {
        "event_id": func.concat("job_", str(row.job_id), "_progress_", moment),
        "data": {"job_id": str(row.job_id), "kind": row.kind, "state": "running", "progress": row.progress},
        "state": DeliveryState.PENDING,
        "attempts": 0,
        "status": None,
        "error": None,
        "next_at": NOW,
        "created_at": NOW,
        "ended_at": None,
    }
    of = {"webhook_id": row.webhook_id, "job_id": row.job_id, "tenant_id": row.tenant_id}
    new = insert(Delivery).values(id=new_id(), type=EventType.JOB_PROGRESS, **of, **fresh)
    old_enough = Delivery.created_at <= NOW - seconds(every)
    told = cast(Delivery.data["progress"].astext, Float) < literal(row.progress)
    return new.on_conflict_do_update(
        index_elements=["webhook_id", "job_id"],
        index_where=text("type = 'job.progress'"),
        set_=fresh,
        where=(Delivery.state != DeliveryState.PENDING) & old_enough & told,
    )
