"""Heartbeats of dispatchers and workers as rows, so that a readiness check asks Postgres only."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.tables import Process

DISPATCHER, WORKER = "dispatcher", "worker"
PRUNE_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Heartbeat:
    """What a process reports of itself."""

    name: str
    kind: str
    lanes: Sequence[str] = ()
    broker_reachable: bool = True


def upsert(session: Session, beat: Heartbeat) -> None:
    """Record the heartbeat, by Postgres' clock."""
    values = {"kind": beat.kind, "lanes": list(beat.lanes), "broker_reachable": beat.broker_reachable, "seen_at": NOW}
    session.execute(
        insert(Process).values(name=beat.name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def deregister(session: Session, name: str) -> None:
    """Remove the row of a process that stops."""
    session.execute(delete(Process).where(Process.name == name))


def prune(session: Session) -> None:
    """Remove the rows of processes that died long ago."""
    session.execute(delete(Process).where(Process.seen_at < func.clock_timestamp() - seconds(PRUNE_AFTER_SECONDS)))


def list_alive(session: Session, within: float) -> Sequence[Process]:
    """The processes with a heartbeat within so many seconds."""
    return session.scalars(select(Process).where(Process.seen_at > NOW - seconds(within))).all()
