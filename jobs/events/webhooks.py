"""Webhooks of a tenant, and `emit`, which writes an event's deliveries in the transaction of the event.

`jobs.events.deliveries` manages deliveries; `worker.dispatcher.webhook_sender` sends them.
"""

import base64
import json
import secrets
import uuid
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from jobs.db import PreparedStatement
from jobs.errors import TooManyWebhooks, WebhookNotFound
from jobs.paging import Page, page
from jobs.tables import Json, Webhook, new_id

DELIVERIES_CHANNEL = "renalq_deliveries"
"""NOTIFY channel: a delivery waits to be sent."""
PREFIX = "whsec_"
"""Prefix of a secret in Standard Webhooks; base64 of 24 to 64 bytes follows."""
MAX_WEBHOOKS = 20
"""Webhooks per tenant: each event writes a row for each of them."""


class EventType(StrEnum):
    """Events that a webhook can subscribe to."""

    JOB_SUCCEEDED = "job.succeeded"
    JOB_PARTIALLY_SUCCEEDED = "job.partially_succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    MODEL_CREATED = "model.created"
    MODEL_PROMOTED = "model.promoted"
    MODEL_ROLLED_BACK = "model.rolled_back"
    MODEL_DRIFTED = "model.drifted"


# One round trip, since jobs end often. $5: an id for each possible webhook. The lock keeps webhooks from being deleted
# before the new rows refer to them; one that is being deleted right now is skipped.
EMIT = PreparedStatement(
    "emit",
    "text, text, text, jsonb, text[], text",
    """
WITH subscribed AS MATERIALIZED (
    SELECT id FROM webhooks WHERE tenant_id = $1 AND $3 = ANY (events) FOR KEY SHARE SKIP LOCKED
), written AS (
    INSERT INTO deliveries (id, webhook_id, tenant_id, event_id, type, data)
    SELECT ($5)[row_number() OVER ()]::uuid, id, $1, $2, $3, $4 FROM subscribed
    ON CONFLICT (webhook_id, event_id) DO NOTHING RETURNING id
)
SELECT pg_notify($6, '') WHERE EXISTS (SELECT FROM written)
""",
)


def emit(session: Session, tenant_id: str, event_id: str, type_: str, data: Json) -> None:
    """Write a delivery for each webhook of the tenant that subscribes to the event, and notify the sender at commit.

    Args:
        event_id: identifies the event, such as `job_ID_succeeded`: emitted twice, it is delivered once.
        data: ids and states, no patient data.
    """
    ids = [str(new_id()) for _ in range(MAX_WEBHOOKS)]
    EMIT(session, tenant_id, event_id, str(type_), json.dumps(data), ids, DELIVERIES_CHANNEL)


def notify_sender(session: Session) -> None:
    """Notify the webhook sender at commit."""
    session.execute(select(func.pg_notify(DELIVERIES_CHANNEL, "")))


def create(session: Session, tenant_id: str, url: str, events: Sequence[str]) -> Webhook:
    """Create a webhook with a new secret of 256 random bits. Check the URL with `jobs.addresses` first.

    Raises:
        TooManyWebhooks
    """
    # Serialized per tenant, so that two concurrent calls cannot exceed the limit.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("webhooks:" + tenant_id))))
    if len(list_webhooks(session, tenant_id, MAX_WEBHOOKS).data) >= MAX_WEBHOOKS:
        raise TooManyWebhooks(most=MAX_WEBHOOKS)
    secret = PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    webhook = Webhook(tenant_id=tenant_id, url=url, events=list(dict.fromkeys(events)), secret=secret)
    session.add(webhook)
    session.flush()
    session.refresh(webhook)
    return webhook


def list_webhooks(session: Session, tenant_id: str, limit: int, after: uuid.UUID | None = None) -> Page[Webhook]:
    """The tenant's webhooks, oldest first."""
    query = select(Webhook).where(Webhook.tenant_id == tenant_id).order_by(Webhook.id).limit(limit + 1)
    if after is not None:
        query = query.where(Webhook.id > after)
    return page(session.scalars(query).all(), limit, lambda webhook: webhook.id)


def get(session: Session, tenant_id: str, webhook_id: uuid.UUID) -> Webhook:
    """A webhook of the tenant.

    Raises:
        WebhookNotFound
    """
    found = session.scalar(select(Webhook).where(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id))
    if found is None:
        raise WebhookNotFound
    return found


def remove(session: Session, tenant_id: str, webhook_id: uuid.UUID) -> None:
    """Delete a webhook with its deliveries. Only a request that is in flight still reaches it.

    Raises:
        WebhookNotFound
    """
    mine = delete(Webhook).where(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id)
    if session.scalar(mine.returning(Webhook.id).execution_options(synchronize_session=False)) is None:
        raise WebhookNotFound
