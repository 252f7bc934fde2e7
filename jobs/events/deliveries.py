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

from sqlalchemy import CTE, ColumnElement, and_, delete, func, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import DeliveryNotFound, WebhookNotFound
from jobs.events.webhooks import notify_sender
from jobs.paging import Page, page
from jobs.tables import Delivery, DeliveryState, Json, Webhook

JITTER = 0.2
"""Random extension of a wait, as a share of it, so that failed deliveries do not retry together."""
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


def claim(session: Session, hold: float, busy: Collection[uuid.UUID], full: Collection[str]) -> DueDelivery | None:
    """Claim the longest due delivery of the webhook that was tried longest ago; None if nothing is due. Commit at once.

    Args:
        hold: seconds until another sender may claim it.
        busy, full: webhooks and tenants to leave out.
    """
    tried = _mark_tried(_next_due(busy, full))
    row = session.execute(
        update(Delivery)
        .where(Delivery.id == tried.c.delivery_id)
        .values(attempts=Delivery.attempts + 1, next_at=NOW + seconds(hold))
        .returning(*_of_due(), tried.c.url, tried.c.secret, NOW.label("now"))
        .execution_options(synchronize_session=False)
    ).first()
    return None if row is None else DueDelivery(**row._mapping)


def _next_due(busy: Collection[uuid.UUID], full: Collection[str]) -> CTE:
    """The next delivery, locked with its webhook. SKIP LOCKED leaves out all deliveries of a webhook that another
    dispatcher is claiming from, and does not wait for a transaction that deletes a webhook."""
    waiting = and_(Delivery.state == DeliveryState.PENDING, Delivery.next_at <= func.now())
    others = and_(Delivery.webhook_id.not_in(busy), Delivery.tenant_id.not_in(full))
    due = (
        select(Delivery.id, Delivery.webhook_id).join(Webhook, Webhook.id == Delivery.webhook_id).where(waiting, others)
    )
    first = due.order_by(Webhook.tried_at.nulls_first(), Delivery.next_at).limit(1)
    return first.with_for_update(of=[Webhook, Delivery], key_share=True, skip_locked=True).cte("turn")


def _mark_tried(turn: CTE) -> CTE:
    marked = update(Webhook).where(Webhook.id == turn.c.webhook_id).values(tried_at=NOW)
    return marked.returning(turn.c.id.label("delivery_id"), Webhook.url, Webhook.secret).cte("tried")


def _of_due() -> list[Any]:
    own = ("id", "webhook_id", "tenant_id", "attempts", "next_at", "event_id", "type", "data", "created_at")
    return [getattr(Delivery, name) for name in own]


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
    query = select(Delivery).where(Delivery.webhook_id == webhook_id).order_by(Delivery.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Delivery.id < after)
    return page(session.scalars(query).all(), limit, lambda delivery: delivery.id)


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


def prune(session: Session, days: float, limit: int = 10_000) -> int:
    """Delete up to `limit` ended deliveries older than this, and return how many were deleted."""
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    # Ids are ordered by time, so the primary key finds the oldest.
    old = select(Delivery.id).where(Delivery.id < _first_id(now - dt.timedelta(days=days)))
    some = old.where(Delivery.state != DeliveryState.PENDING).order_by(Delivery.id).limit(limit)
    gone = delete(Delivery).where(Delivery.id.in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def _first_id(time: dt.datetime) -> uuid.UUID:
    """A lower bound of all UUIDv7 of that millisecond or later."""
    return uuid.UUID(int=int(time.timestamp() * 1000) << 80)
