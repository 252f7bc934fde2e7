"""The consistency checker of `design/FAULTS.md`: it reads the database after a fault and reports violations.

    python -m tests.jobs.checker DATABASE_URL [--ended]

prints a line for each thing that is wrong, and ends with 1 if there is any.
"""

import sys

from sqlalchemy import text
from sqlalchemy.orm import Session

QUESTIONS = {
    "a scan has not exactly one result": """
        SELECT j.id FROM jobs j LEFT JOIN scan_results r ON r.job_id = j.id
        WHERE j.kind LIKE 'predict%' AND j.results_expired_at IS NULL GROUP BY j.id
        HAVING j.total <> count(r.*) OR min(r.ordinal) <> 0 OR max(r.ordinal) <> j.total - 1""",
    "an ended job has a pending scan": """
        SELECT j.id FROM jobs j JOIN scan_results r ON r.job_id = j.id
        WHERE j.finished_at IS NOT NULL AND r.state = 'pending' GROUP BY j.id""",
    "an ended unit has a pending scan": """
        SELECT u.id FROM units u JOIN scan_results r ON r.unit_id = u.id
        WHERE u.finished_at IS NOT NULL AND r.state = 'pending' GROUP BY u.id""",
    "a pending scan belongs to no unit of its job": """
        SELECT r.job_id FROM scan_results r LEFT JOIN units u ON u.id = r.unit_id AND u.job_id = r.job_id
        WHERE r.state = 'pending' AND u.id IS NULL GROUP BY r.job_id""",
    "a job has not exactly one terminal event": """
        SELECT j.id FROM jobs j LEFT JOIN job_events e ON e.job_id = j.id
            AND e.type IN ('succeeded', 'partially_succeeded', 'failed', 'cancelled')
        GROUP BY j.id HAVING count(e.id) <> (j.finished_at IS NOT NULL)::int""",
    "a terminal event names another state than the job's": """
        SELECT j.id FROM jobs j JOIN job_events e ON e.job_id = j.id
        WHERE e.type IN ('succeeded', 'partially_succeeded', 'failed', 'cancelled') AND e.type <> j.state""",
    "counters differ from the rows": """
        SELECT j.id FROM jobs j LEFT JOIN scan_results r ON r.job_id = j.id
        WHERE j.kind LIKE 'predict%' AND j.results_expired_at IS NULL GROUP BY j.id
        HAVING j.succeeded <> count(*) FILTER (WHERE r.state = 'succeeded')
            OR j.failed <> count(*) FILTER (WHERE r.state = 'failed')
            OR j.cancelled <> count(*) FILTER (WHERE r.state = 'cancelled')""",
    "an ended job's counters do not add up to its total": """
        SELECT id FROM jobs WHERE finished_at IS NOT NULL AND succeeded + failed + cancelled <> total""",
    "an ended job has an unfinished unit": """
        SELECT j.id FROM jobs j JOIN units u ON u.job_id = j.id
        WHERE j.finished_at IS NOT NULL AND u.finished_at IS NULL GROUP BY j.id""",
    "a job whose units have all ended has not": """
        SELECT j.id FROM jobs j JOIN units u ON u.job_id = j.id
        WHERE j.finished_at IS NULL GROUP BY j.id HAVING bool_and(u.finished_at IS NOT NULL)""",
    "a running unit is more than 15 s past its lease": """
        SELECT id FROM units WHERE state = 'running'
            AND lease_expires_at < clock_timestamp() - interval '15 seconds'""",
    "a unit waits though its job's end was asked for": """
        SELECT u.id FROM units u JOIN jobs j ON j.id = u.job_id
        WHERE u.state IN ('scheduled', 'queued', 'dispatched') AND j.finished_at IS NULL
            AND j.cancel_requested_at < clock_timestamp() - interval '15 seconds'""",
    "two units have the same fence": """
        SELECT min(id::text) FROM units WHERE fence IS NOT NULL GROUP BY fence HAVING count(*) > 1""",
    "claims differ from the events": """
        SELECT j.id FROM jobs j JOIN LATERAL (
            SELECT sum(greatest(attempt - 1, 0)) + (max(attempt) > 0)::int AS claims,
                max(ordinal) + 1 > count(*) AS pruned FROM units WHERE job_id = j.id) u ON true
        WHERE NOT pruned
            AND claims <> (SELECT count(*) FROM job_events e WHERE e.job_id = j.id AND e.type = 'claimed')""",
    "a job that did not fail has an error, or one that failed has none": """
        SELECT id FROM jobs WHERE state <> 'cancelled' AND (state = 'failed') <> (error IS NOT NULL)""",
    "a waiting or running unit's size differs from its scans": """
        SELECT u.id FROM units u JOIN jobs j ON j.id = u.job_id
            LEFT JOIN scan_results r ON r.unit_id = u.id AND r.state = 'pending'
        WHERE u.finished_at IS NULL AND u.explains IS NULL AND j.kind LIKE 'predict%'
        GROUP BY u.id HAVING u.scans <> greatest(1, count(r.*))""",
    "a tenant's load differs from its unfinished jobs": """
        SELECT coalesce(l.tenant_id, j.tenant_id) FROM tenant_loads l FULL JOIN (
            SELECT tenant_id, sum(total) AS scans, count(*) FILTER (WHERE kind = 'predict_batch') AS batches
            FROM jobs WHERE finished_at IS NULL GROUP BY tenant_id) j ON j.tenant_id = l.tenant_id
        WHERE coalesce(l.scans, 0) <> coalesce(j.scans, 0) OR coalesce(l.batches, 0) <> coalesce(j.batches, 0)""",
    "predictions were counted twice, or not at all": """
        SELECT m.id FROM model_versions m LEFT JOIN LATERAL (
            SELECT count(*) AS made FROM jobs j JOIN scan_results r ON r.job_id = j.id
            WHERE j.model_id = m.id AND j.kind LIKE 'predict%' AND r.state = 'succeeded' AND NOT r.cached) r ON true
        WHERE r.made <> (SELECT coalesce(sum(scans), 0) FROM prediction_counts c WHERE c.model_id = m.id
                AND c.what = 'class')
            AND NOT EXISTS (SELECT FROM jobs j WHERE j.model_id = m.id AND j.results_expired_at IS NOT NULL)""",
    "a job has more than two checkpoints": """
        SELECT job_id FROM checkpoints GROUP BY job_id HAVING count(*) > 2""",
}
ENDED = {"a job has not ended": "SELECT id FROM jobs WHERE finished_at IS NULL"}


def faults(session: Session, ended: bool = False) -> list[str]:
    """The violations in the database, with the rows that show them; empty if it is consistent.

    Args:
        ended: whether nothing may be left to do.
    """
    questions = {**QUESTIONS, **ENDED} if ended else QUESTIONS
    found = {fault: session.execute(text(question)).scalars().all() for fault, question in questions.items()}
    return [f"{fault}: {_some(rows)}" for fault, rows in found.items() if rows]


def _some(rows: object) -> str:
    shown = [str(row) for row in list(rows)]  # type: ignore[call-overload]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def main() -> int:
    """Check the database given on the command line."""
    from jobs.db import session_factory

    with session_factory(sys.argv[1], pool_size=1)() as session:
        wrong = faults(session, ended="--ended" in sys.argv[2:])
    print("\n".join(wrong) or "Nothing is wrong.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
