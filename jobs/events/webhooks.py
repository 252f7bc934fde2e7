"""Webhooks of a tenant, and `emit`, which writes an event's deliveries in the transaction of the event.

`jobs.events.deliveries` manages deliveries; `worker.dispatcher.webhook_sender` sends them.
"""

import base64
import json
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, PreparedStatement, seconds
from jobs.errors import TooManyWebhooks, WebhookNotFound
from jobs.paging import Page, page
from jobs.states import TERMINAL, JobState
from jobs.tables import Delivery, JobWebhook, Json, Webhook, new_id

DELIVERIES_CHANNEL = "renalq_deliveries"
"""NOTIFY channel: a delivery waits to be sent."""
PREFIX = "whsec_"
"""Prefix of a secret in Standard Webhooks; base64 of 24 to 64 bytes follows."""
MAX_WEBHOOKS = 20
"""Webhooks per tenant: each event writes a row for each of them."""


class EventType(StrEnum):
    """Events that a webhook can subscribe to."""

    JOB_STARTED = "job.started"
    JOB_PROGRESS = "job.progress"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_PARTIALLY_SUCCEEDED = "job.partially_succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    MODEL_CREATED = "model.created"
    MODEL_PROMOTED = "model.promoted"
    MODEL_ROLLED_BACK = "model.rolled_back"
    MODEL_DRIFTED = "model.drifted"


JOB_EVENTS = tuple(type_ for type_ in EventType if type_.startswith("job."))
"""Events that a job's own webhook can have."""
JOB_ENDS = tuple(EventType(f"job.{state}") for state in sorted(TERMINAL))
"""Those that it has if it names none."""


@dataclass(frozen=True)
class Receiver:
    """Where the events of a job go, beside the tenant's webhooks. An empty secret: they are not signed."""

    url: str
    secret: str = ""
    events: Sequence[str] = JOB_ENDS


# One round trip, since jobs end often. $5: an id for each possible webhook. The lock keeps webhooks from being deleted
# before the new rows refer to them; one that is being deleted right now is skipped.
EMIT = PreparedStatement(
    "emit",
    "text, text, text, jsonb, text[], text, uuid, text",
    """
WITH subscribed AS MATERIALIZED (
    SELECT id FROM webhooks
    WHERE tenant_id = $1 AND NOT of_jobs AND $3 = ANY (events) AND ($8 IS NULL OR kinds IS NULL OR $8 = ANY (kinds))
    FOR KEY SHARE SKIP LOCKED
), own AS MATERIALIZED (
    SELECT webhooks.id FROM job_webhooks JOIN webhooks ON webhooks.id = webhook_id
    WHERE job_webhooks.job_id = $7 AND $3 = ANY (job_webhooks.events) AND $3 = ANY (webhooks.events)
    FOR KEY SHARE OF webhooks SKIP LOCKED
), written AS (
    INSERT INTO deliveries (id, webhook_id, tenant_id, event_id, type, data, job_id)
    SELECT ($5)[row_number() OVER ()]::uuid, id, $1, $2, $3, $4, $7
    FROM (SELECT id FROM subscribed UNION ALL SELECT id FROM own) AS receivers
    ON CONFLICT (webhook_id, event_id) DO NOTHING RETURNING id
)
SELECT pg_notify($6, '') WHERE EXISTS (SELECT FROM written)
""",
)


def emit(
    session: Session,
    tenant_id: str,
    event_id: str,
    type_: str,
    data: Json,
    job_id: uuid.UUID | None = None,
    kind: str | None = None,
) -> None:
    """Write a delivery for each webhook of the tenant that subscribes to the event, and notify the sender at commit.

    Args:
        event_id: identifies the event, such as `job_ID_succeeded`: emitted twice, it is delivered once.
        data: ids and states, no patient data.
        job_id: of a job's event, which also goes to the receiver that the job has named.
        kind: of that job; webhooks may ask for some kinds only.
    """
    ids = [str(new_id()) for _ in range(MAX_WEBHOOKS + 1)]
    of_job = str(job_id) if job_id else None, str(kind) if kind else None
    EMIT(session, tenant_id, event_id, str(type_), json.dumps(data), ids, DELIVERIES_CHANNEL, *of_job)


def emit_job(session: Session, tenant_id: str, job_id: uuid.UUID, kind: str, state: str) -> None:
    """`emit` that a job has started, or has ended in this state."""
    happened = "started" if state == JobState.RUNNING else state
    data = {"job_id": str(job_id), "kind": str(kind), "state": str(state)}
    emit(session, tenant_id, f"job_{job_id}_{happened}", f"job.{happened}", data, job_id, kind)


def notify_sender(session: Session) -> None:
    """Notify the webhook sender at commit."""
    session.execute(select(func.pg_notify(DELIVERIES_CHANNEL, "")))


def create(
    session: Session, tenant_id: str, url: str, events: Sequence[str], kinds: Sequence[str] | None = None
) -> Webhook:
    """Create a webhook with a new secret of 256 random bits. Check the URL with `jobs.addresses` first.

    `kinds`: of the jobs whose events it gets; None: all.

    Raises:
        TooManyWebhooks
    """
    # Serialized per tenant, so that two concurrent calls cannot exceed the limit.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("webhooks:" + tenant_id))))
    if len(list_webhooks(session, tenant_id, MAX_WEBHOOKS).data) >= MAX_WEBHOOKS:
        raise TooManyWebhooks(most=MAX_WEBHOOKS)
    secret = PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    wanted = {"events": list(dict.fromkeys(events)), "kinds": list(dict.fromkeys(kinds)) if kinds else None}
    webhook = Webhook(tenant_id=tenant_id, url=url, secret=secret, **wanted)
    session.add(webhook)
    session.flush()
    session.refresh(webhook)
    return webhook


def list_webhooks(session: Session, tenant_id: str, limit: int, after: uuid.UUID | None = None) -> Page[Webhook]:
    """The tenant's webhooks, oldest first."""
    query = select(Webhook).where(*_of_tenant(tenant_id)).order_by(Webhook.id).limit(limit + 1)
    if after is not None:
        query = query.where(Webhook.id > after)
    return page(session.scalars(query).all(), limit, lambda webhook: webhook.id)


def get(session: Session, tenant_id: str, webhook_id: uuid.UUID) -> Webhook:
    """A webhook of the tenant.

    Raises:
        WebhookNotFound
    """
    found = session.scalar(select(Webhook).where(Webhook.id == webhook_id, *_of_tenant(tenant_id)))
    if found is None:
        raise WebhookNotFound
    return found


def remove(session: Session, tenant_id: str, webhook_id: uuid.UUID) -> None:
    """Delete a webhook with its deliveries. Only a request that is in flight still reaches it.

    Raises:
        WebhookNotFound
    """
    mine = delete(Webhook).where(Webhook.id == webhook_id, *_of_tenant(tenant_id))
    if session.scalar(mine.returning(Webhook.id).execution_options(synchronize_session=False)) is None:
        raise WebhookNotFound


def _of_tenant(tenant_id: str) -> tuple[ColumnElement[bool], ...]:
    """Those that the tenant has made; not the receivers of single jobs."""
    return Webhook.tenant_id == tenant_id, ~Webhook.of_jobs


# --- receivers of single jobs ---


def attach(session: Session, tenant_id: str, job_id: uuid.UUID, receiver: Receiver) -> None:
    """Send the events of a new job to this receiver. Check the URL with `jobs.addresses` first.

    Jobs with the same receiver share a webhook. One that had unsubscribed by 410 is subscribed again.
    """
    mine = {"tenant_id": tenant_id, "url": receiver.url, "secret": receiver.secret, "of_jobs": True}
    webhook_id = session.scalar(_in_use(mine)) or session.scalar(_subscribed(mine))
    events = list(map(str, receiver.events))
    session.add(JobWebhook(job_id=job_id, tenant_id=tenant_id, webhook_id=webhook_id, events=events))
    session.flush()


def _in_use(mine: Json) -> Any:
    """Its webhook, if a job has named it lately: then jobs that name it at once do not wait for each other."""
    lately = Webhook.created_at > NOW - seconds(3600), Webhook.events != []
    return select(Webhook.id).filter_by(**mine).where(*lately).with_for_update(read=True, key_share=True)


def _subscribed(mine: Json) -> Any:
    now = {"events": list(map(str, JOB_EVENTS)), "created_at": NOW}
    new = insert(Webhook).values(id=new_id(), **mine, **now, tried_at=NOW)  # it goes behind all others
    key = ["tenant_id", "url", "secret"]
    kept = new.on_conflict_do_update(index_elements=key, index_where=text("of_jobs"), set_=now)
    return kept.returning(Webhook.id)


def receiver_of(session: Session, job_id: uuid.UUID) -> Receiver | None:
    """The receiver that a job has named."""
    query = select(Webhook.url, Webhook.secret, JobWebhook.events).join(Webhook, Webhook.id == JobWebhook.webhook_id)
    row = session.execute(query.where(JobWebhook.job_id == job_id)).first()
    return None if row is None else Receiver(*row)


def prune(session: Session, days: float) -> None:
    """Delete receivers that no job has named for so many days, and that no job or delivery refers to any more."""
    old = Webhook.of_jobs, Webhook.created_at < NOW - seconds(days * 24 * 3600)
    unused = ~exists().where(JobWebhook.webhook_id == Webhook.id), ~exists().where(Delivery.webhook_id == Webhook.id)
    session.execute(delete(Webhook).where(*old, *unused).execution_options(synchronize_session=False))
