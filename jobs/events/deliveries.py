"""Deliveries of events to webhooks: claimed, sent again, sent anew by hand, listed, forgotten.

A claim moves the delivery's next try ahead and is committed before anything is sent: nobody else sends it meanwhile,
and a sender that dies leaves it to the next one. So an event arrives at least once, and bears the same id each time.
Webhooks take turns, whoever owns them: however much is due to those that never answer, another waits for one try of
each of them at most.
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
from jobs.events.webhooks import ring
from jobs.paging import Page, page
from jobs.tables import Delivery, DeliveryState, Json, Webhook

SPREAD = 0.2
"""A wait is up to so much longer, by chance: what failed together does not come back together."""
GONE = 410
"""The status by which a receiver says that it wants nothing more."""


@dataclass(frozen=True)
class Due:
    """A delivery that is ours to send. `attempts` counts this try. `next_at`, which the claim has set, is the fence of
    what follows: another claim, or somebody who wants it sent anew meanwhile, sets another."""

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
    """By Postgres' clock: a receiver refuses what is signed at another time than its own."""


@dataclass(frozen=True)
class Attempt:
    """How a try ended: without an error it was delivered. `status`: of the answer, if one came."""

    status: int | None
    error: str | None = None


def claim(session: Session, hold: float, busy: Collection[uuid.UUID], full: Collection[str]) -> Due | None:
    """What has been due for longest to the webhook that was tried longest ago, held for `hold` seconds; None when
    nothing is due. Commit at once.

    Args:
        busy, full: webhooks and tenants that have to wait.
    """
    tried = _tried(_turn(busy, full))
    row = session.execute(
        update(Delivery)
        .where(Delivery.id == tried.c.delivery_id)
        .values(attempts=Delivery.attempts + 1, next_at=NOW + seconds(hold))
        .returning(*_of_due(), tried.c.url, tried.c.secret, NOW.label("now"))
        .execution_options(synchronize_session=False)
    ).first()
    return None if row is None else Due(**row._mapping)


def _turn(busy: Collection[uuid.UUID], full: Collection[str]) -> CTE:
    """Whose turn it is, locked. The webhook is locked first, so that where another dispatcher has it none of what is
    due to it is touched; and nobody is waited for, such as who deletes the webhook and then its deliveries."""
    waits = and_(Delivery.state == DeliveryState.PENDING, Delivery.next_at <= func.now())
    others = and_(Delivery.webhook_id.not_in(busy), Delivery.tenant_id.not_in(full))
    due = select(Delivery.id, Delivery.webhook_id).join(Webhook, Webhook.id == Delivery.webhook_id).where(waits, others)
    first = due.order_by(Webhook.tried_at.nulls_first(), Delivery.next_at).limit(1)
    return first.with_for_update(of=[Webhook, Delivery], key_share=True, skip_locked=True).cte("turn")


def _tried(turn: CTE) -> CTE:
    marked = update(Webhook).where(Webhook.id == turn.c.webhook_id).values(tried_at=NOW)
    return marked.returning(turn.c.id.label("delivery_id"), Webhook.url, Webhook.secret).cte("tried")


def _of_due() -> list[Any]:
    own = ("id", "webhook_id", "tenant_id", "attempts", "next_at", "event_id", "type", "data", "created_at")
    return [getattr(Delivery, name) for name in own]


def ended(session: Session, due: Due, attempt: Attempt, retries: Sequence[float]) -> None:
    """Write down how a try ended, and when the next one is; and wake who sends, for what has waited behind it.

    Args:
        retries: seconds until the second try, the third, and so on. None are left: it has failed.
    """
    ring(session)
    if attempt.status == GONE:
        _silence(session, due)
        retries = ()
    told: Json = {"status": attempt.status, "error": attempt.error}
    if attempt.error is None:
        told.update(state=DeliveryState.DELIVERED, ended_at=NOW)
    elif due.attempts <= len(retries):
        told.update(next_at=NOW + seconds(retries[due.attempts - 1] * random.uniform(1, 1 + SPREAD)))
    else:
        told.update(state=DeliveryState.FAILED, ended_at=NOW)
    ours = and_(Delivery.id == due.id, Delivery.next_at == due.next_at, Delivery.state == DeliveryState.PENDING)
    session.execute(_updated(ours, **told))


def _silence(session: Session, due: Due) -> None:
    """The webhook hears of nothing more, and stays with its deliveries, so that its owner sees why."""
    session.execute(update(Webhook).where(Webhook.id == due.webhook_id).values(events=[]))
    mine = and_(Delivery.webhook_id == due.webhook_id, Delivery.state == DeliveryState.PENDING)
    why = "The receiver has answered 410 to another delivery: nothing more is sent to it."
    session.execute(_updated(and_(mine, Delivery.id != due.id), state=DeliveryState.FAILED, ended_at=NOW, error=why))


def _updated(which: ColumnElement[bool], **values: Any) -> Any:
    return update(Delivery).where(which).values(**values).execution_options(synchronize_session=False)


# --- for the webhook's owner ---


def listed(
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
    """Send it now, whatever became of it: one try more, and where any are left of them, those after it. Should a try be
    on its way this moment, it is sent once more when that has ended.

    Raises:
        DeliveryNotFound
    """
    mine = and_(Delivery.id == delivery_id, Delivery.webhook_id == webhook_id, Delivery.tenant_id == tenant_id)
    again = _updated(mine, state=DeliveryState.PENDING, next_at=NOW, ended_at=None)
    found: Delivery | None = session.scalar(again.returning(Delivery))
    if found is None:
        raise DeliveryNotFound
    ring(session)
    return found


def prune(session: Session, days: float, limit: int = 10_000) -> int:
    """Forget ended deliveries older than this, `limit` at a time. Returns how many were forgotten."""
    now: dt.datetime = session.execute(select(func.now())).scalar_one()
    # Their ids are ordered by time, so the primary key finds the oldest.
    old = select(Delivery.id).where(Delivery.id < _first_id(now - dt.timedelta(days=days)))
    some = old.where(Delivery.state != DeliveryState.PENDING).order_by(Delivery.id).limit(limit)
    gone = delete(Delivery).where(Delivery.id.in_(some)).execution_options(synchronize_session=False)
    return int(session.execute(gone).rowcount)  # type: ignore[attr-defined]


def _first_id(time: dt.datetime) -> uuid.UUID:
    """What no UUIDv7 of that millisecond or a later one is less than."""
    return uuid.UUID(int=int(time.timestamp() * 1000) << 80)
