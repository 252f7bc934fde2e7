"""Idempotency keys: one key of a client, one thing made, and the first answer again for as long as it is kept.

A key is known by its SHA-256 and belongs to a tenant. While its first request is being answered it is locked; the
`locked_at` of the lock is a fence: who lost the lock to another writes nothing. A process that died leaves a lock that
is taken over after `LOCK_SECONDS`. What it had made by then is found by the one that takes over, instead of a second
being made: a job bears the key itself (`Job.idempotency_key`), and of other things the key's row bears the id (`bear`).
"""

import datetime as dt
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, exists, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import IdempotencyConflict, IdempotencyInFlight
from jobs.tables import IdempotencyKey, Job

LOCK_SECONDS = 60.0
"""A request that has not been answered for so long is taken for dead."""


@dataclass(frozen=True)
class Keyed:
    """A request that came with a key. `fingerprint`: SHA-256 of all that makes it this request and no other."""

    tenant_id: str
    key_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class Fresh:
    """Go on: the lock is ours. `made_id`: what an earlier try has made already."""

    locked_at: dt.datetime
    made_id: uuid.UUID | None


@dataclass(frozen=True)
class Replay:
    """The first answer."""

    status: int
    headers: Mapping[str, str]
    body: str


def begin(session: Session, keyed: Keyed, hours: float) -> Fresh | Replay:
    """Lock the key, or give back its first answer. Commit at once: others wait for this row.

    Args:
        hours: how long a key is remembered.

    Raises:
        IdempotencyConflict: the key came with another request.
        IdempotencyInFlight: the first request with it is still being answered.
    """
    _forget(session, and_(_is_old(hours), _is(keyed)))
    new = insert(IdempotencyKey).values(**vars(keyed))
    stale = and_(
        IdempotencyKey.status.is_(None),
        IdempotencyKey.fingerprint == new.excluded.fingerprint,
        IdempotencyKey.locked_at < NOW - seconds(LOCK_SECONDS),
    )
    locked_at = session.scalar(
        new.on_conflict_do_update(
            index_elements=["tenant_id", "key_sha256"], set_={"locked_at": NOW}, where=stale
        ).returning(IdempotencyKey.locked_at)
    )
    return _told(session, keyed) if locked_at is None else Fresh(locked_at, made(session, keyed))


def made(session: Session, keyed: Keyed) -> uuid.UUID | None:
    """The job that bears the key, or what else was noted as made with it."""
    job = session.scalar(select(Job.id).where(_bears(keyed)))
    return job or session.scalar(select(IdempotencyKey.made_id).where(_is(keyed)))


def bear(session: Session, keyed: Keyed, held: Fresh, made_id: uuid.UUID) -> None:
    """Note what is made, in the transaction that makes it: both are there, or neither.

    Raises:
        IdempotencyInFlight: another has taken the lock over, and makes it.
    """
    noted = session.execute(update(IdempotencyKey).where(_is(keyed), _holds(held)).values(made_id=made_id))
    if noted.rowcount == 0:  # type: ignore[attr-defined]
        raise IdempotencyInFlight


def finish(session: Session, keyed: Keyed, held: Fresh, answer: Replay) -> None:
    """Keep the answer, unless another has taken the lock over."""
    values = {"status": answer.status, "headers": dict(answer.headers), "body": answer.body}
    session.execute(update(IdempotencyKey).where(_is(keyed), _holds(held)).values(**values))


def release(session: Session, keyed: Keyed, held: Fresh) -> None:
    """Give the key up after an error: the next request with it is a first one.

    Where something was made with it already (the error came after its commit), only the lock goes: the same request
    again finds it, and another request is still refused.
    """
    nothing_made = and_(IdempotencyKey.made_id.is_(None), ~exists().where(_bears(keyed)))
    session.execute(delete(IdempotencyKey).where(_is(keyed), _holds(held), nothing_made))
    session.execute(update(IdempotencyKey).where(_is(keyed), _holds(held)).values(locked_at=func.to_timestamp(0)))


def prune(session: Session, hours: float, limit: int = 1000) -> int:
    """Forget keys older than this, `limit` at a time. Returns how many were forgotten."""
    old = select(IdempotencyKey.tenant_id, IdempotencyKey.key_sha256).where(_is_old(hours))
    some = old.order_by(IdempotencyKey.created_at).limit(limit)
    return _forget(session, tuple_(IdempotencyKey.tenant_id, IdempotencyKey.key_sha256).in_(some))


def _told(session: Session, keyed: Keyed) -> Replay:
    row = session.execute(
        select(IdempotencyKey.fingerprint, IdempotencyKey.status, IdempotencyKey.headers, IdempotencyKey.body).where(
            _is(keyed)
        )
    ).first()
    if row is None:  # given up this moment
        raise IdempotencyInFlight
    if row.fingerprint != keyed.fingerprint:
        raise IdempotencyConflict
    if row.status is None:
        raise IdempotencyInFlight
    return Replay(row.status, row.headers or {}, row.body or "")


def _forget(session: Session, which: ColumnElement[bool]) -> int:
    """Remove keys, and take them off their jobs: each is free to be used anew."""
    old = delete(IdempotencyKey).where(which).returning(IdempotencyKey.tenant_id, IdempotencyKey.key_sha256)
    gone = session.execute(old.execution_options(synchronize_session=False)).all()
    if gone:
        bears = tuple_(Job.tenant_id, Job.idempotency_key).in_([tuple(row) for row in gone])
        session.execute(
            update(Job).where(bears).values(idempotency_key=None).execution_options(synchronize_session=False)
        )
    return len(gone)


def _is(keyed: Keyed) -> ColumnElement[bool]:
    return and_(IdempotencyKey.tenant_id == keyed.tenant_id, IdempotencyKey.key_sha256 == keyed.key_sha256)


def _bears(keyed: Keyed) -> ColumnElement[bool]:
    return and_(Job.tenant_id == keyed.tenant_id, Job.idempotency_key == keyed.key_sha256)


def _holds(held: Fresh) -> ColumnElement[bool]:
    return and_(IdempotencyKey.status.is_(None), IdempotencyKey.locked_at == held.locked_at)


def _is_old(hours: float) -> ColumnElement[bool]:
    return IdempotencyKey.created_at < NOW - seconds(hours * 3600)
