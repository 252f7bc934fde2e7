"""Heartbeats of dispatchers and workers as rows, so that a readiness check asks Postgres only.

A worker is named NODE/INSTANCE: Celery's node name, such as `predict@gpu-1`, and an id that each start of the node gets
anew. The child process that runs its units claims them as NODE/INSTANCE/PID. So a worker that was killed and started
again under the same name is another one: what its predecessor held does not make it busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.tables import Json, Process

DISPATCHER, WORKER = "dispatcher", "worker"
ALIVE_SECONDS = 60.0
"""Workers with a heartbeat this recent count as serving their lanes."""
PRUNE_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Heartbeat:
    """What a process reports of itself."""

    name: str
    kind: str
    lanes: Sequence[str] = ()
    broker_reachable: bool = True
    device: str | None = None


def upsert(session: Session, beat: Heartbeat) -> None:
    """Record the heartbeat, by Postgres' clock."""
    values = {
        "kind": beat.kind,
        "lanes": list(beat.lanes),
        "broker_reachable": beat.broker_reachable,
        "device": beat.device,
        "seen_at": NOW,
    }
    session.execute(
        insert(Process).values(name=beat.name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def register(session: Session, beat: Heartbeat) -> None:
    """Record the first heartbeat of a worker's instance. Earlier instances of its node have ended: their rows go."""
    node = beat.name.split("/")[0]
    session.execute(delete(Process).where(Process.name.startswith(f"{node}/", autoescape=True)))
    upsert(session, beat)


def deregister(session: Session, name: str) -> None:
    """Remove the row of a process that stops."""
    session.execute(delete(Process).where(Process.name == name))


def report_weights(session: Session, name: str, weights: Json) -> None:
    """Record which weights a worker can read, as lists by pipeline. Heartbeats leave this alone, so that they stay
    small; and nothing is written while nothing changes."""
    changed = Process.name == name, Process.weights.is_distinct_from(weights)
    session.execute(update(Process).where(*changed).values(weights=weights))


def readable_weights(session: Session, lane: str, pipeline: str) -> set[str] | None:
    """What some live worker of the lane can read for a pipeline; None where nobody knows: no worker of the lane lives,
    or one has not said (it has just started, or is of a release before 0010)."""
    workers = [process for process in list_alive(session, ALIVE_SECONDS) if lane in process.lanes]
    said = [(worker.weights or {}).get(pipeline) for worker in workers]
    if not said or None in said:
        return None
    return {name for names in said for name in names or ()}


def prune(session: Session) -> None:
    """Remove the rows of processes that died long ago."""
    session.execute(delete(Process).where(Process.seen_at < func.clock_timestamp() - seconds(PRUNE_AFTER_SECONDS)))


def list_alive(session: Session, within: float) -> Sequence[Process]:
    """The processes with a heartbeat within so many seconds."""
    return session.scalars(select(Process).where(Process.seen_at > NOW - seconds(within))).all()
