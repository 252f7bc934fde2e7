"""The end of a job: once no unit is left, its counters decide its final state."""

import uuid

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement
from jobs.events import webhooks
from jobs.tables import Job, Json, ScanResult

FINISH_JOB = PreparedStatement(
    "end_job",
    "uuid",
    """
WITH ended AS (
    UPDATE jobs SET finished_at = clock_timestamp(),
        progress = CASE WHEN succeeded = total THEN 1 ELSE progress END,
        state = CASE
            WHEN succeeded = total THEN 'succeeded'
            WHEN cancel_requested_at IS NOT NULL AND cancelled > 0 THEN 'cancelled'
            WHEN succeeded = 0 THEN 'failed'
            ELSE 'partially_succeeded' END
    WHERE id = $1 AND finished_at IS NULL
        AND NOT EXISTS (SELECT FROM units WHERE units.job_id = $1 AND units.finished_at IS NULL)
    RETURNING id, tenant_id, kind, state, total, succeeded, failed, cancelled, error
), event AS (
    INSERT INTO job_events (job_id, tenant_id, type, data)
    SELECT id, tenant_id, state, jsonb_build_object('counts', jsonb_build_object(
        'total', total, 'succeeded', succeeded, 'failed', failed, 'cancelled', cancelled)) FROM ended
), unloaded AS (
    UPDATE tenant_loads SET scans = scans - total, batches = batches - (kind = 'predict_batch')::int
    FROM ended WHERE tenant_loads.tenant_id = ended.tenant_id
)
SELECT tenant_id, kind, state, total, state = 'failed' AND error IS NULL AS unexplained,
    EXISTS (SELECT FROM webhooks WHERE webhooks.tenant_id = ended.tenant_id) AS has_webhooks FROM ended
""",
)


def finish_job_if_done(session: Session, job_id: uuid.UUID) -> None:
    """End the job if no unit is left: final state, event, the tenant's load and webhook deliveries."""
    ended = FINISH_JOB(session, str(job_id)).first()
    if ended is None:
        return
    if ended.has_webhooks:
        data = {"job_id": str(job_id), "kind": ended.kind, "state": ended.state}
        webhooks.emit(session, ended.tenant_id, f"job_{job_id}_{ended.state}", f"job.{ended.state}", data)
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
