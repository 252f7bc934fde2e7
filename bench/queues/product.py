"""The product's calls that differ between checkouts, each at one place."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from jobs.queue import completion, dispatch
from jobs.settings import Settings
from jobs.states import UnitState
from jobs.tables import Unit
from worker.dispatcher.scheduler import FairScheduler, Plan

WORKERS = 100
KIND = ", kind" if hasattr(Unit, "kind") else ""
"""A column of units, which has the name of the one of jobs that it repeats."""


class Planner:
    """The dispatcher's decision, without its loop: look at the queue, and plan."""

    def __init__(self) -> None:
        settings = Settings()
        self._scheduler = FairScheduler(settings.chunk_scans, settings.rung_ahead_seconds, settings.newcomer_seconds)
        known: dict[str, Any] = {
            "redispatch_seconds": settings.ring_again_seconds,
            "per_job": WORKERS,
            "alive_seconds": 3 * settings.process_seconds,
        }
        if "chunks_rung_per_job" in Settings.model_fields:
            known["per_job"] = settings.chunks_rung_per_job
        self._reader = dispatch.QueueReader() if hasattr(dispatch, "QueueReader") else None
        self._read: Any = self._reader.read if self._reader else getattr(dispatch, "snapshot")  # noqa: B009  (older)
        self._arguments = {k: v for k, v in known.items() if k in inspect.signature(self._read).parameters}

    def look(self, session: Session) -> Plan:
        """What would be dispatched now."""
        queue = self._read(session, per_tenant=self._scheduler.units_to_read({}), **self._arguments)
        return self._scheduler.plan(queue, {})

    def marked(self, unit_ids: Sequence[uuid.UUID]) -> None:
        """These units were dispatched."""
        if self._reader:
            self._reader.marked(unit_ids)


def waiting_state(in_future: bool) -> str:
    """The state of a unit that waits for a time, or for a worker."""
    return "scheduled" if in_future and "scheduled" in list(UnitState) else "queued"


def end_cancelled(session: Session) -> None:
    """What the dispatcher does in the background for cancelled jobs, once."""
    if hasattr(completion, "cancel_batch"):
        completion.cancel_batch(session)
