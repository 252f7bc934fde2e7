"""The checker of `design/FAULTS.md`: reads the database after any fault and says what is wrong."""

from sqlalchemy import text
from sqlalchemy.orm import Session

QUESTIONS = {
    "a job has not exactly one terminal event": """
        SELECT j.id FROM jobs j LEFT JOIN job_events e ON e.job_id = j.id
            AND e.type IN ('succeeded', 'partially_succeeded', 'failed', 'cancelled')
        WHERE j.finished_at IS NOT NULL GROUP BY j.id HAVING count(e.id) <> 1""",
    "a terminal event names another state than the job's": """
        SELECT j.id FROM jobs j JOIN job_events e ON e.job_id = j.id
        WHERE e.type IN ('succeeded', 'partially_succeeded', 'failed', 'cancelled') AND e.type <> j.state""",
    "counters differ from the rows": """
        SELECT j.id FROM jobs j LEFT JOIN scan_results r ON r.job_id = j.id
        WHERE j.kind LIKE 'predict%' GROUP BY j.id
        HAVING j.total <> count(r.*) OR j.succeeded <> count(*) FILTER (WHERE r.state = 'succeeded')
            OR j.failed <> count(*) FILTER (WHERE r.state = 'failed')
            OR j.cancelled <> count(*) FILTER (WHERE r.state = 'cancelled')""",
    "an ended job has a pending scan": """
        SELECT j.id FROM jobs j JOIN scan_results r ON r.job_id = j.id
        WHERE j.finished_at IS NOT NULL AND r.state = 'pending'""",
    "an ended job has an unfinished unit": """
        SELECT j.id FROM jobs j JOIN units u ON u.job_id = j.id
        WHERE j.finished_at IS NOT NULL AND u.finished_at IS NULL""",
    "a job whose units have all ended has not": """
        SELECT j.id FROM jobs j JOIN units u ON u.job_id = j.id
        WHERE j.finished_at IS NULL GROUP BY j.id HAVING bool_and(u.finished_at IS NOT NULL)""",
    "a running unit is long past its lease": """
        SELECT id FROM units WHERE state = 'running'
            AND lease_expires_at < clock_timestamp() - interval '30 seconds'""",
}


def faults(session: Session) -> list[str]:
    """What is wrong in the database; an empty list is what every test wants."""
    return [fault for fault, question in QUESTIONS.items() if session.execute(text(question)).first() is not None]
