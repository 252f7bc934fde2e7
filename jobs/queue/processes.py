"""Signs of life: every dispatcher and worker keeps a fresh row, so that readiness is a question to Postgres alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.tables import Process

DISPATCHER, WORKER = "dispatcher", "worker"
FORGOTTEN_AFTER = 3600.0


@dataclass(frozen=True)
class SignOfLife:
    """What a process says of itself."""

    name: str
    kind: str
    lanes: Sequence[str] = ()
    broker_reachable: bool = True


def alive(session: Session, sign: SignOfLife) -> None:
    """Say that the process lives now."""
    values = {"kind": sign.kind, "lanes": list(sign.lanes), "broker_reachable": sign.broker_reachable, "seen_at": NOW}
    session.execute(
        insert(Process).values(name=sign.name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def gone(session: Session, name: str) -> None:
    """Say that the process ends."""
    session.execute(delete(Process).where(Process.name == name))


def forget(session: Session) -> None:
    """Remove the rows of processes that ended without a word long ago."""
    session.execute(delete(Process).where(Process.seen_at < func.clock_timestamp() - seconds(FORGOTTEN_AFTER)))


def seen(session: Session, within: float) -> Sequence[Process]:
    """The processes that gave a sign of life within so many seconds."""
    return session.scalars(select(Process).where(Process.seen_at > NOW - seconds(within))).all()
