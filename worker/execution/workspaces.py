"""Scratch folders of units: one per attempt, removed at its end, or by a later start after a crash."""

import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select

from jobs.db import StandingSession
from jobs.states import UnitState
from jobs.tables import Unit

NAME = re.compile(r"(?P<unit>[0-9a-f-]{36})-(?P<fence>[0-9]+)-.*")
LOG_RETENTION_SECONDS = 14 * 24 * 3600.0


@contextmanager
def workspace(root: Path, unit_id: uuid.UUID, fence: int) -> Iterator[Path]:
    """A folder for one attempt. Folders of the unit's earlier attempts that died are removed."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{unit_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{unit_id}-{fence}-", dir=root)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(root: Path, sessions: StandingSession) -> int:
    """Remove the folders of ended attempts, and old logs. Returns how many folders were removed."""
    folders = {path: match for path in root.iterdir() if path.is_dir() and (match := NAME.fullmatch(path.name))}
    with sessions.begin() as session:
        units = {uuid.UUID(match["unit"]) for match in folders.values()}
        leased = select(Unit.id, Unit.fence).where(Unit.id.in_(units), Unit.state == UnitState.RUNNING)
        running = {(row.id, row.fence) for row in session.execute(leased)}
    ended = [p for p, match in folders.items() if (uuid.UUID(match["unit"]), int(match["fence"])) not in running]
    for path in ended:
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob("*.log"):
        if path.stat().st_mtime < time.time() - LOG_RETENTION_SECONDS:
            path.unlink(missing_ok=True)
    return len(ended)
