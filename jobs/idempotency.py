"""Idempotency keys: one key makes one resource, and repeats the first response as long as it is stored.

A key is stored as its SHA-256 and belongs to a tenant. It is locked while its first request is being answered;
`locked_at` is the fence of the lock: a request that has lost it writes nothing. The lock of a process that died is
taken over after `LOCK_SECONDS`. The request that takes it over finds what the dead one had made, instead of making a
second one: a job holds the key itself (`Job.idempotency_key`), and for other resources the key's row holds their id
(`attach_resource`).
"""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import IdempotencyConflict, IdempotencyInFlight
from jobs.tables import IdempotencyKey, Job

LOCK_SECONDS = 60.0
"""A request that has not been answered for so long (s) counts as dead."""
PRUNED_AT_ONCE = 1000
"""Keys that are deleted in one transaction."""
LOCATED = func.right(IdempotencyKey.headers["Location"].astext, 36)
"""SQL: the id at the end of the address of what the request made."""


@dataclass(frozen=True)
class KeyedRequest:
    """A request with a key. `fingerprint`: SHA-256 of everything that distinguishes the request."""

    tenant_id: str
    key_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class Acquired:
    """The lock is acquired. `resource_id`: what an earlier attempt has made already."""

    locked_at: dt.datetime
    resource_id: uuid.UUID | None


@dataclass(frozen=True)
class StoredResponse:
    """The first response."""

    status: int
    headers: Mapping[str, str]
    body: str


def acquire(session: Session, keyed: KeyedRequest, hours: float) -> Acquired | StoredResponse:
    """Lock the key, or return its stored response. Commit at once: others wait for this row.

    Args:
        hours: how long a key is kept.

    Raises:
        IdempotencyConflict: the key came with another request.
        IdempotencyInFlight: the first request with it is still being answered.
    """
    _delete_expired(session, keyed, hours)
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
    return _stored_response(session, keyed) if locked_at is None else Acquired(locked_at, find_resource(session, keyed))


def find_resource(session: Session, keyed: KeyedRequest) -> uuid.UUID | None:
    """Id of the job that has the key, or of the resource attached to it."""
    job = session.scalar(select(Job.id).where(_has_key(keyed)))
    return job or session.scalar(select(IdempotencyKey.made_id).where(_same_key(keyed)))


def attach_resource(session: Session, keyed: KeyedRequest, lock: Acquired, resource_id: uuid.UUID) -> None:
    """Store the resource's id with the key, in the transaction that makes the resource.

    Raises:
        IdempotencyInFlight: another request has taken over the lock, and makes it.
    """
    attached = session.execute(update(IdempotencyKey).where(_same_key(keyed), _holds(lock)).values(made_id=resource_id))
    if attached.rowcount == 0:  # type: ignore[attr-defined]
        raise IdempotencyInFlight


def store_response(session: Session, keyed: KeyedRequest, lock: Acquired, response: StoredResponse) -> None:
    """Store the response, unless another request has taken over the lock."""
    values = {"status": response.status, "headers": dict(response.headers), "body": response.body}
    session.execute(update(IdempotencyKey).where(_same_key(keyed), _holds(lock)).values(**values))


def release(session: Session, keyed: KeyedRequest, lock: Acquired) -> None:
    """Delete the key after an error, so that the next request with it counts as the first.

    If a resource was made already (the error came after its commit), only the lock is released: the same request finds
    the resource, and a different request is still refused.
    """
    nothing_made = and_(IdempotencyKey.made_id.is_(None), ~exists().where(_has_key(keyed)))
    session.execute(delete(IdempotencyKey).where(_same_key(keyed), _holds(lock), nothing_made))
    session.execute(update(IdempotencyKey).where(_same_key(keyed), _holds(lock)).values(locked_at=func.to_timestamp(0)))


# Jobs that others work on are skipped with their keys: a transaction that locks several jobs must not wait for any.
PRUNE = text("""
WITH expired AS MATERIALIZED (
    SELECT tenant_id, key_sha256, (
        SELECT id FROM jobs WHERE jobs.tenant_id = keys.tenant_id AND idempotency_key = key_sha256) AS job_id
    FROM idempotency_keys AS keys
    WHERE created_at < now() - make_interval(secs => :seconds) ORDER BY created_at LIMIT :limit
    FOR UPDATE OF keys SKIP LOCKED
), locked AS MATERIALIZED (
    SELECT id FROM jobs WHERE id IN (SELECT job_id FROM expired) FOR NO KEY UPDATE SKIP LOCKED
), freed AS (
    UPDATE jobs SET idempotency_key = NULL WHERE id IN (SELECT id FROM locked)
)
DELETE FROM idempotency_keys AS keys USING expired
WHERE keys.tenant_id = expired.tenant_id AND keys.key_sha256 = expired.key_sha256
    AND (job_id IS NULL OR job_id IN (SELECT id FROM locked))
""")


def prune(session: Session, hours: float, limit: int = PRUNED_AT_ONCE) -> int:
    """Delete up to `limit` keys older than this, also from their jobs, and return how many were deleted."""
    return int(session.execute(PRUNE, {"seconds": hours * 3600, "limit": limit}).rowcount)  # type: ignore[attr-defined]


def forget(session: Session, tenant_id: str, made: Sequence[uuid.UUID], keys: Sequence[str] = ()) -> None:
    """Delete the keys whose responses show one of these resources, and those with these hashes."""
    showing = or_(
        and_(IdempotencyKey.headers.has_key("Location"), LOCATED.in_([str(each) for each in made])),
        IdempotencyKey.made_id.in_(made),
        IdempotencyKey.key_sha256.in_(keys),
    )
    mine = select(IdempotencyKey.key_sha256).where(IdempotencyKey.tenant_id == tenant_id, showing)
    ordered = mine.order_by(IdempotencyKey.key_sha256).with_for_update()  # so that two requests cannot deadlock
    gone = delete(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key_sha256.in_(ordered))
    session.execute(gone.execution_options(synchronize_session=False))


def _stored_response(session: Session, keyed: KeyedRequest) -> StoredResponse:
    row = session.execute(
        select(IdempotencyKey.fingerprint, IdempotencyKey.status, IdempotencyKey.headers, IdempotencyKey.body).where(
            _same_key(keyed)
        )
    ).first()
    if row is None:  # released in between
        raise IdempotencyInFlight
    if row.fingerprint != keyed.fingerprint:
        raise IdempotencyConflict
    if row.status is None:
        raise IdempotencyInFlight
    return StoredResponse(row.status, row.headers or {}, row.body or "")


def _delete_expired(session: Session, keyed: KeyedRequest, hours: float) -> None:
    """Delete the key if it has expired, also from its job, so that it can be used again."""
    expired = delete(IdempotencyKey).where(_is_expired(hours), _same_key(keyed)).returning(IdempotencyKey.key_sha256)
    if session.scalar(expired.execution_options(synchronize_session=False)) is not None:
        freed = update(Job).where(_has_key(keyed)).values(idempotency_key=None)
        session.execute(freed.execution_options(synchronize_session=False))


def _same_key(keyed: KeyedRequest) -> ColumnElement[bool]:
    return and_(IdempotencyKey.tenant_id == keyed.tenant_id, IdempotencyKey.key_sha256 == keyed.key_sha256)


def _has_key(keyed: KeyedRequest) -> ColumnElement[bool]:
    return and_(Job.tenant_id == keyed.tenant_id, Job.idempotency_key == keyed.key_sha256)


def _holds(lock: Acquired) -> ColumnElement[bool]:
    return and_(IdempotencyKey.status.is_(None), IdempotencyKey.locked_at == lock.locked_at)


def _is_expired(hours: float) -> ColumnElement[bool]:
    return IdempotencyKey.created_at < NOW - seconds(hours * 3600)
