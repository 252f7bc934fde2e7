"""How a job ends: once no unit is left, its counters decide its final state. And how the units of a cancelled job end:
at once if they are few, otherwise in batches by the leading dispatcher, so that no request waits for a large job."""

import uuid

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement
from jobs.events import webhooks
from jobs.queue.leases import with_job_lock
from jobs.states import UNCLAIMED
from jobs.tables import IS_CANCELLING, Job, Json, ScanResult, Unit

INLINE_ROWS = 1000
"""Results that one request or one worker ends, about 50 ms."""
BATCH_ROWS = 2000
"""Results that the leader ends in one transaction, besides what is left of the last unit."""
QUEUE_BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
"""Upper bounds (s) of the classes in which ended jobs are counted by their time in the queue."""

# The last unfinished unit is looked for from the end: units are done from the front, where the index keeps an entry of
# each as long as any transaction is older.
FINISH_JOB = PreparedStatement(
    "finish_job",
    "uuid",
    """
WITH done AS (
    SELECT id, CASE
        WHEN succeeded = total THEN 'succeeded'
        WHEN cancel_requested_at IS NOT NULL AND cancelled > 0 THEN 'cancelled'
        WHEN succeeded = 0 THEN 'failed'
        ELSE 'partially_succeeded' END AS state
    FROM jobs WHERE id = $1 AND (finished_at IS NULL) IS TRUE
        AND (SELECT units.id FROM units WHERE units.job_id = $1 AND units.finished_at IS NULL
            ORDER BY units.job_id DESC, units.ordinal DESC LIMIT 1) IS NULL
), ended AS (
    UPDATE jobs SET finished_at = clock_timestamp(), state = done.state,
        progress = CASE WHEN done.state = 'succeeded' THEN 1 ELSE progress END,
        error = CASE WHEN done.state IN ('failed', 'cancelled') THEN (
            SELECT units.error FROM units WHERE job_id = $1 AND units.state = 'failed' AND explains IS NULL
            ORDER BY units.finished_at DESC LIMIT 1) END
    FROM done WHERE jobs.id = done.id
    RETURNING jobs.id, tenant_id, kind, jobs.state, total, succeeded, failed, cancelled, error,
        extract(epoch FROM coalesce(started_at, finished_at) - created_at)::float8 AS queued,
        extract(epoch FROM finished_at - coalesce(started_at, finished_at))::float8 AS ran
), event AS (
    INSERT INTO job_events (job_id, tenant_id, type, data)
    SELECT id, tenant_id, state, jsonb_build_object('counts', jsonb_build_object(
        'total', total, 'succeeded', succeeded, 'failed', failed, 'cancelled', cancelled)) FROM ended
), unloaded AS (
    UPDATE tenant_loads SET scans = scans - total, batches = batches - (kind = 'predict_batch')::int
    FROM ended WHERE tenant_loads.tenant_id = ended.tenant_id
    RETURNING tenant_loads.tenant_id
), counted AS (
    INSERT INTO job_counts AS counts
        (tenant_id, kind, state, bucket, jobs, succeeded, failed, cancelled, queue_seconds, run_seconds)
    SELECT tenant_id, kind, state, width_bucket(queued, {bounds}), 1, succeeded, failed, cancelled, queued, ran
    FROM ended, (SELECT count(*) FROM unloaded) AS load_first
    ON CONFLICT (tenant_id, kind, state, bucket) DO UPDATE SET jobs = counts.jobs + 1,
        succeeded = counts.succeeded + excluded.succeeded, failed = counts.failed + excluded.failed,
        cancelled = counts.cancelled + excluded.cancelled,
        queue_seconds = counts.queue_seconds + excluded.queue_seconds,
        run_seconds = counts.run_seconds + excluded.run_seconds
)
SELECT tenant_id, kind, state, total, state = 'failed' AND error IS NULL AS unexplained,
    EXISTS (SELECT FROM webhooks WHERE webhooks.tenant_id = ended.tenant_id) AS has_webhooks FROM ended
""".replace("{bounds}", f"ARRAY{[float(bound) for bound in QUEUE_BOUNDS]}::float8[]"),
)


def finish_job_if_done(session: Session, job_id: uuid.UUID) -> None:
    """End the job if no unit is left: final state, event, the tenant's load and webhook deliveries."""
    ended = FINISH_JOB(session, str(job_id)).first()
    if ended is None:
        return
    if ended.has_webhooks:
        webhooks.emit_job(session, ended.tenant_id, job_id, ended.kind, ended.state)
    if ended.unexplained:
        session.execute(update(Job).where(Job.id == job_id).values(error=_error_of_scans(session, job_id, ended.total)))


def _error_of_scans(session: Session, job_id: uuid.UUID, total: int) -> Json:
    if total == 1:
        return session.scalars(select(ScanResult.error).where(ScanResult.job_id == job_id)).one() or {}
    return {
        "code": "ALL_SCANS_FAILED",
        "detail": f"None of the {total} scans has a result. GET /jobs/ID/results?state=failed says why for each.",
        "retryable": False,
    }


# --- units of a cancelled job ---

# Arrays instead of joins: without statistics of what was just written, the planner would read whole tables.
CANCEL_UNITS = PreparedStatement(
    "cancel_units",
    "uuid, int",
    """
WITH unclaimed AS (
    SELECT id, sum(scans) OVER (ORDER BY ordinal) - scans AS before FROM (
        SELECT id, scans, ordinal FROM units
        WHERE job_id = $1 AND finished_at IS NULL AND state IN ('scheduled', 'queued', 'dispatched')
        ORDER BY ordinal LIMIT $2) AS oldest
), ended AS (
    UPDATE units SET state = 'cancelled', finished_at = clock_timestamp()
    WHERE id = ANY (ARRAY(SELECT id FROM unclaimed WHERE before < $2))
        AND state IN ('scheduled', 'queued', 'dispatched')
    RETURNING id
), results AS (
    UPDATE scan_results SET state = 'cancelled', finished_at = clock_timestamp()
    WHERE unit_id = ANY (ARRAY(SELECT id FROM ended)) AND state = 'pending' RETURNING ordinal
)
UPDATE jobs SET cancelled = cancelled + CASE WHEN kind IN ('predict', 'predict_batch')
    THEN (SELECT count(*) FROM results) ELSE (SELECT count(*) FROM ended) END
WHERE id = $1 AND EXISTS (SELECT FROM ended)
""",
)


def cancel_units(session: Session, job_id: uuid.UUID, rows: int = INLINE_ROWS) -> None:
    """End unclaimed units of a cancelled job, and the job if none is left. The job's row must be locked.

    Args:
        rows: results to end; the last unit may add its own.
    """
    CANCEL_UNITS(session, str(job_id), rows)
    finish_job_if_done(session, job_id)


def cancel_batch(session: Session) -> bool:
    """End a batch of units of a cancelled job. False: nothing is left to end, or others are ending it.

    Jobs that are locked are skipped, so that one of them delays no other.
    """
    left = select(Unit.id).where(Unit.job_id == Job.id, Unit.finished_at.is_(None), Unit.state.in_(UNCLAIMED))
    cancelled = select(Job.id).where(text(IS_CANCELLING), left.exists())
    job_id = session.scalar(with_job_lock(cancelled.order_by(Job.lane, Job.id).limit(1), skip_locked=True))
    if job_id is None:
        return False
    cancel_units(session, job_id, BATCH_ROWS)
    return True
