"""Deliveries of events to webhooks: claim, record attempts, redeliver, list and prune.

A claim moves the delivery's next attempt into the future and is committed before anything is sent: no other sender
takes it meanwhile, and if the sender dies, another one does afterwards. So an event is delivered at least once, each
time with the same id. Webhooks take turns across tenants: however many deliveries are due to receivers that do not
answer, another webhook waits for one attempt of each of them at most.
"""

import datetime as dt
import random
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, String, Uuid, and_, bindparam, delete, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import DeliveryNotFound, WebhookNotFound
from jobs.events.webhooks import notify_sender
from jobs.paging import Page, page
from jobs.tables import Delivery, DeliveryState, Json, Webhook
from jobs.tables.columns import LAST_ID, first_id

JITTER = 0.2
"""Random extension of a wait, as a share of it, so that failed deliveries do not retry together."""
PRUNED_AT_ONCE = 10_000
GONE = 410
"""HTTP status by which a receiver unsubscribes."""


@dataclass(frozen=True)
class DueDelivery:
    """A claimed delivery. `attempts` includes this one. `next_at`, set by the claim, fences the record of the attempt:
    another claim or a redelivery changes it."""

    id: uuid.UUID
    webhook_id: uuid.UUID
    tenant_id: str
    attempts: int
    next_at: dt.datetime
    event_id: str
    type: str
    data: Json
    created_at: dt.datetime
    url: str
    secret: str
    now: dt.datetime
    """By Postgres' clock: receivers reject signatures whose timestamp is too far from their own."""


@dataclass(frozen=True)
class Attempt:
    """Outcome of an attempt: delivered if `error` is None. `status`: of the response, if there was one."""

    status: int | None
    error: str | None = None


# The webhooks with deliveries, one step of the index each, and the first due delivery of the one that was tried longest
# ago: however many are due to one receiver, only its first is read. SKIP LOCKED leaves out a webhook that another
# dispatcher is claiming from, and does not wait for a transaction that deletes one.
CLAIM = text("""
WITH RECURSIVE waiting AS (
    (SELECT webhook_id, next_at FROM deliveries WHERE state = 'pending' ORDER BY webhook_id, next_at LIMIT 1)
    UNION ALL
    SELECT following.webhook_id, following.next_at FROM waiting CROSS JOIN LATERAL (
        SELECT webhook_id, next_at FROM deliveries
        WHERE state = 'pending' AND webhook_id > waiting.webhook_id ORDER BY webhook_id, next_at LIMIT 1
    ) AS following
), turn AS MATERIALIZED (
    SELECT webhooks.id FROM waiting JOIN webhooks ON webhooks.id = waiting.webhook_id
    WHERE waiting.next_at <= now() AND webhooks.id <> ALL (:busy) AND webhooks.tenant_id <> ALL (:full)
    ORDER BY webhooks.tried_at NULLS FIRST, waiting.next_at LIMIT 1
    FOR NO KEY UPDATE OF webhooks SKIP LOCKED
), tried AS (
    UPDATE webhooks SET tried_at = clock_timestamp() FROM turn WHERE webhooks.id = turn.id
    RETURNING webhooks.id, url, secret
), first AS MATERIALIZED (
    SELECT due.id, url, secret FROM tried CROSS JOIN LATERAL (
        SELECT id FROM deliveries WHERE webhook_id = tried.id AND state = 'pending' AND next_at <= now()
        ORDER BY next_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
    ) AS due
)
UPDATE deliveries SET attempts = attempts + 1, next_at = clock_timestamp() + make_interval(secs => :hold)
FROM first WHERE deliveries.id = first.id
RETURNING deliveries.id, webhook_id, tenant_id, attempts, next_at, event_id, type, data, created_at, url, secret,
    clock_timestamp() AS now
""").bindparams(bindparam("busy", type_=ARRAY(Uuid)), bindparam("full", type_=ARRAY(String)))


def claim(session: Session, hold: float, busy: Collection[uuid.UUID], full: Collection[str]) -> DueDelivery | None:
    """Claim the longest due delivery of the webhook that was tried longest ago; None if nothing is due. Commit at once.

    Args:
        hold: seconds until another sender may claim it.
        busy, full: webhooks and tenants to leave out.
    """
    row = session.execute(CLAIM, {"hold": hold, "busy": list(busy), "full": list(full)}).first()
    return None if row is None else DueDelivery(**row._mapping)


def record_attempt(session: Session, due: DueDelivery, attempt: Attempt, retries: Sequence[float]) -> None:
    """Record an attempt and schedule the next one; notify the sender, since this webhook may be claimed from again.

    Args:
        retries: seconds until the second attempt, the third, and so on; after the last one the delivery fails.
    """
    notify_sender(session)
    if attempt.status == GONE:
        _disable_webhook(session, due)
        retries = ()
    values: Json = {"status": attempt.status, "error": attempt.error}
    if attempt.error is None:
        values.update(state=DeliveryState.DELIVERED, ended_at=NOW)
    elif due.attempts <= len(retries):
        values.update(next_at=NOW + seconds(retries[due.attempts - 1] * random.uniform(1, 1 + JITTER)))
    else:
        values.update(state=DeliveryState.FAILED, ended_at=NOW)
    ours = and_(Delivery.id == due.id, Delivery.next_at == due.next_at, Delivery.state == DeliveryState.PENDING)
    session.execute(_updated(ours, **values))


def _disable_webhook(session: Session, due: DueDelivery) -> None:
    """Unsubscribe the webhook from all events. It stays with its deliveries, so that its owner can see the reason."""
    session.execute(update(Webhook).where(Webhook.id == due.webhook_id).values(events=[]))
    mine = and_(Delivery.webhook_id == due.webhook_id, Delivery.state == DeliveryState.PENDING)
    why = "The receiver has answered 410 to another delivery: nothing more is sent to it."
    session.execute(_updated(and_(mine, Delivery.id != due.id), state=DeliveryState.FAILED, ended_at=NOW, error=why))


def _updated(which: ColumnElement[bool], **values: Any) -> Any:
    return update(Delivery).where(which).values(**values).execution_options(synchronize_session=False)


# --- for the owner of a webhook ---


def list_deliveries(
    session: Session, tenant_id: str, webhook_id: uuid.UUID, limit: int, after: uuid.UUID | None
) -> Page[Delivery]:
    """A webhook's deliveries, newest first.

    Raises:
        WebhookNotFound
    """
    mine = and_(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id)
    if session.scalar(select(Webhook.id).where(mine)) is None:
        raise WebhookNotFound
    # Whole keys, or the planner may walk the primary key, past all deliveries of other webhooks.
    key = tuple_(Delivery.webhook_id, Delivery.id)
    older = key < tuple_(webhook_id, after or LAST_ID), key >= tuple_(webhook_id, first_id(0))
    query = select(Delivery).where(*older).order_by(Delivery.webhook_id.desc(), Delivery.id.desc())
    return page(session.scalars(query.limit(limit + 1)).all(), limit, lambda delivery: delivery.id)


def redeliver(session: Session, tenant_id: str, webhook_id: uuid.UUID, delivery_id: uuid.UUID) -> Delivery:
    """Send a delivery again now, whatever its state: one more attempt, and the retries that are left. If an attempt is
    in flight, it is sent again after that.

    Raises:
        DeliveryNotFound
    """
    mine = and_(Delivery.id == delivery_id, Delivery.webhook_id == webhook_id, Delivery.tenant_id == tenant_id)
    again = _updated(mine, state=DeliveryState.PENDING, next_at=NOW, ended_at=None)
    found: Delivery | None = session.scalar(again.returning(Delivery))
    if found is None:
        raise DeliveryNotFound
    notify_sender(session)
    return found


def prune(session: Session, days: float, limit: int = PRUNED_AT_ONCE) -> int:
    """Delete up to `limit` ended deliveries older than this, and return how many were deleted."""
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    # Ids are ordered by time, so the primary key finds the oldest.
    old = select(Delivery.id).where(Delivery.id < first_id(now.timestamp() - days * 24 * 3600))
    some = old.where(Delivery.state != DeliveryState.PENDING).order_by(Delivery.id).limit(limit)
    some = some.with_for_update(skip_locked=True)  # they may be deleted with their webhook right now
    gone = delete(Delivery).where(Delivery.id.in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def delete_of_job(session: Session, job_id: uuid.UUID, limit: int) -> int:
    """Delete up to `limit` deliveries of a job's events, and return how many. Those that are being sent are skipped."""
    some = select(Delivery.id).where(*_of_job(job_id)).limit(limit).with_for_update(skip_locked=True)
    gone = delete(Delivery).where(Delivery.id.in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def has_some(session: Session, job_id: uuid.UUID) -> bool:
    """Whether deliveries of the job's events are left."""
    return session.scalar(select(Delivery.id).where(*_of_job(job_id)).limit(1)) is not None


def _of_job(job_id: uuid.UUID) -> tuple[ColumnElement[bool], ...]:
    return Delivery.data.has_key("job_id"), Delivery.data["job_id"].astext == str(job_id)
