"""Expired keys leave their jobs, but for jobs that others work on."""

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from jobs import idempotency
from jobs.db import NOW, Sessions
from jobs.queue.leases import lock_job
from jobs.tables import IdempotencyKey, Job
from tests.builders import TENANT, make_job


def old_job(session: Session, key: str) -> Job:
    """A job whose key has expired."""
    job = make_job(session, idempotency_key=key * 64)
    session.add(IdempotencyKey(tenant_id=TENANT, key_sha256=key * 64, fingerprint="f" * 64))
    session.flush()
    session.execute(update(IdempotencyKey).values(created_at=NOW - text("interval '2 days'")))
    return job


def test_key_of_a_locked_job_is_left_for_the_next_time(sessions: Sessions) -> None:
    with sessions.begin() as session:
        locked, free = old_job(session, "a"), old_job(session, "b")
        session.refresh(free)
        revision = free.revision
    with sessions() as other, sessions.begin() as session:
        lock_job(other, locked.id)
        assert idempotency.prune(session, 24) == 1
        assert session.scalars(select(IdempotencyKey.key_sha256)).all() == ["a" * 64]
        keys = {row.id: row.idempotency_key for row in session.execute(select(Job.id, Job.idempotency_key))}
        assert keys == {locked.id: "a" * 64, free.id: None}
        assert session.get_one(Job, free.id).revision == revision, "nobody sees that a key has expired"
    with sessions.begin() as session:
        assert idempotency.prune(session, 24) == 1
