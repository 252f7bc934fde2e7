"""What trainings leave in RENALQ_HOME of the machine that the dispatcher runs on: cached pixels and features, logs of
trainings that died, and folders of attempts whose worker was never started again.

Each is named by a dataset, a job or a unit, and goes once that is gone. Nothing is noted down: a sweep that was cut off
is made good by the next one.
"""

import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy import select, union
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.deletions import receipts
from jobs.settings import Settings
from jobs.tables import Dataset, Job, Unit
from ml.spec.pipeline import CACHE_OWNERS

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
KEY = re.compile(r"[0-9a-f]{64}")
"""The name of a cache entry."""
Owned = dict[Path, set[uuid.UUID]]
"""Files and folders with their owners."""
Exist = Callable[[Session, Sequence[uuid.UUID]], set[uuid.UUID]]


def sweep(sessions: Sessions, settings: Settings) -> bool:
    """Remove what belongs to rows that are gone. Returns False: there is no more."""
    _remove_ownerless(sessions, _cached(settings.feature_cache), _datasets_and_jobs)
    _remove_ownerless(sessions, _named(settings.work, "*.log"), _datasets_and_jobs)
    _remove_ownerless(sessions, _named(settings.work, "*/"), _units)
    return False


def _remove_ownerless(sessions: Sessions, found: Owned, exist: Exist) -> None:
    """Remove the files and folders that one of their owners has left, and those that name none: an older release made
    them."""
    if not found:
        return
    with sessions.begin() as session:
        living = exist(session, list(set().union(*found.values())))
    for path in (path for path, owners in found.items() if not owners or owners - living):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _cached(folder: Path) -> Owned:
    entries = folder.iterdir() if folder.is_dir() else ()
    return {entry: _owners(entry) for entry in entries if KEY.fullmatch(entry.name)}


def _owners(entry: Path) -> set[uuid.UUID]:
    try:
        return {uuid.UUID(line) for line in (entry / CACHE_OWNERS).read_text().split()}
    except (OSError, ValueError):
        return set()


def _named(folder: Path, pattern: str) -> Owned:
    """Those whose name begins with an id."""
    found = {path: _ID.match(path.name) for path in folder.glob(pattern)}
    return {path: {uuid.UUID(match[0])} for path, match in found.items() if match}


def _datasets_and_jobs(session: Session, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    jobs = select(Job.id).where(Job.id.in_(ids), ~receipts.is_hidden(Job.tenant_id))
    return set(session.scalars(union(select(Dataset.id).where(Dataset.id.in_(ids)), jobs)))


def _units(session: Session, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    return set(session.scalars(select(Unit.id).where(Unit.id.in_(ids))))
