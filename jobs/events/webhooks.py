"""Webhooks: who hears of what, and the deliveries that an event writes in its own transaction.

What follows from a delivery is in `jobs.events.deliveries`; `worker.dispatcher.webhook_sender` sends it.
"""

import base64
import json
import secrets
import uuid
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from jobs.db import Prepared
from jobs.errors import TooManyWebhooks, WebhookNotFound
from jobs.tables import Json, Webhook, new_id

DELIVERIES_CHANNEL = "renalq_deliveries"
"""NOTIFY channel: a delivery waits to be sent."""
PREFIX = "whsec_"
"""Standard Webhooks' mark of a secret: base64 of 24 to 64 bytes follows."""
MOST = 20
"""Webhooks that a tenant may have: each event writes a row for each of them."""


class EventType(StrEnum):
    """What a webhook may hear of."""

    JOB_SUCCEEDED = "job.succeeded"
    JOB_PARTIALLY_SUCCEEDED = "job.partially_succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    MODEL_CREATED = "model.created"
    MODEL_PROMOTED = "model.promoted"
    MODEL_ROLLED_BACK = "model.rolled_back"
    MODEL_DRIFTED = "model.drifted"


# One trip, as jobs end often. $5: an id for each webhook that there may be. Webhooks are locked, so that none is
# deleted before our rows refer to it; one that is being deleted this moment need not hear of anything.
EMIT = Prepared(
    "emit",
    "text, text, text, jsonb, text[], text",
    """
WITH hears AS MATERIALIZED (
    SELECT id FROM webhooks WHERE tenant_id = $1 AND $3 = ANY (events) FOR KEY SHARE SKIP LOCKED
), written AS (
    INSERT INTO deliveries (id, webhook_id, tenant_id, event_id, type, data)
    SELECT ($5)[row_number() OVER ()]::uuid, id, $1, $2, $3, $4 FROM hears
    ON CONFLICT (webhook_id, event_id) DO NOTHING RETURNING id
)
SELECT pg_notify($6, '') WHERE EXISTS (SELECT FROM written)
""",
)


def emit(session: Session, tenant_id: str, event_id: str, type_: str, data: Json) -> None:
    """Write a delivery of the event for every webhook that hears of such, and wake the dispatcher at commit.

    Emitted twice, it is delivered once: `event_id` is the event's own, such as `job_ID_succeeded`.

    Args:
        data: ids and states; nothing of a patient leaves the house.
    """
    ids = [str(new_id()) for _ in range(MOST)]
    EMIT(session, tenant_id, event_id, str(type_), json.dumps(data), ids, DELIVERIES_CHANNEL)


def ring(session: Session) -> None:
    """Wake whoever sends, at commit."""
    session.execute(select(func.pg_notify(DELIVERIES_CHANNEL, "")))


def create(session: Session, tenant_id: str, url: str, events: Sequence[str]) -> Webhook:
    """Make a webhook with a new secret of 256 random bits. `jobs.addresses` says which addresses may be given.

    Raises:
        TooManyWebhooks
    """
    # One at a time per tenant, so that two at once do not both find room.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("webhooks:" + tenant_id))))
    if len(listed(session, tenant_id)) >= MOST:
        raise TooManyWebhooks(most=MOST)
    secret = PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    webhook = Webhook(tenant_id=tenant_id, url=url, events=list(dict.fromkeys(events)), secret=secret)
    session.add(webhook)
    session.flush()
    session.refresh(webhook)
    return webhook


def listed(session: Session, tenant_id: str) -> Sequence[Webhook]:
    """The tenant's webhooks, oldest first."""
    return session.scalars(select(Webhook).where(Webhook.tenant_id == tenant_id).order_by(Webhook.id)).all()


def remove(session: Session, tenant_id: str, webhook_id: uuid.UUID) -> None:
    """Delete a webhook with its deliveries: nothing more is sent to it, but for what is on its way this moment.

    Raises:
        WebhookNotFound
    """
    mine = delete(Webhook).where(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id)
    if session.scalar(mine.returning(Webhook.id).execution_options(synchronize_session=False)) is None:
        raise WebhookNotFound
