"""Retention of feedback. The oldest goes first, so that no older label of a scan counts again."""

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.retention.batches import ROWS, id_bound, older_than
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from jobs.tables import Truth


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Delete a batch by RENALQ_FEEDBACK_DAYS. True: there are more."""
    if not settings.feedback_days:
        return False
    with sessions.begin() as session:
        return delete_feedback(session, settings.feedback_days)


def delete_feedback(session: Session, days: float, rows: int = ROWS) -> bool:
    """Delete up to `rows` rows of feedback that was sent more than `days` ago. True: there are more."""
    bound = id_bound(session, days)
    oldest = select(Truth.id).where(Truth.id < bound, older_than(Truth.at, days)).order_by(Truth.id).limit(rows)
    gone = delete(Truth).where(Truth.id.in_(oldest)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount) == rows  # type: ignore[attr-defined]
