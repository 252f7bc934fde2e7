"""Retention of the counts by study: they tell whether a study of today is known already, so yesterday's are needed no
more (the last scans of a day may be counted after midnight)."""

from sqlalchemy import Date, cast, delete, func, select, tuple_

from jobs.db import Sessions
from jobs.retention.batches import ROWS
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from jobs.tables import StudyCount

KEY = StudyCount.model_id, StudyCount.day, StudyCount.study


def step(sessions: Sessions, store: BlobStore, settings: Settings) -> bool:
    """Delete a batch of the days before yesterday. True: there are more."""
    today = cast(func.timezone("UTC", func.now()), Date)
    old = select(*KEY).where(StudyCount.day < today - 1).limit(ROWS)
    with sessions.begin() as session:
        gone = delete(StudyCount).where(tuple_(*KEY).in_(old)).execution_options(synchronize_session=False)
        return int(session.execute(gone).rowcount) == ROWS  # type: ignore[attr-defined]
