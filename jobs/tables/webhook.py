"""Tables of webhooks and their deliveries."""

import datetime as dt
import uuid
from enum import StrEnum

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import Json, counter, id_column, one_of, optional_time, tenant_column, time_of_insert


class Webhook(Base):
    """A tenant's subscription to events, or (`of_jobs`) the receiver that single jobs name: one row for each address.

    The secret is stored, since it signs each delivery (Standard Webhooks); empty: a job's receiver without signatures.
    """

    __tablename__ = "webhooks"
    __table_args__ = (
        # For events: the receivers that jobs have named are not stepped over.
        Index("ix_webhooks_subscribed", "tenant_id", postgresql_where=text("NOT of_jobs")),
        Index("uq_webhooks_of_jobs", "tenant_id", "url", "secret", unique=True, postgresql_where=text("of_jobs")),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = tenant_column()
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(ARRAY(String(40)))
    kinds: Mapped[list[str] | None] = mapped_column(ARRAY(String(20)))  # of jobs; null: all
    of_jobs: Mapped[bool] = mapped_column(Boolean, default=False, server_default="false")
    secret: Mapped[str] = mapped_column(String(100))
    tried_at: Mapped[dt.datetime | None] = optional_time()  # the webhook that was tried longest ago is served first
    created_at: Mapped[dt.datetime] = time_of_insert()  # of jobs: when one has named it last


class JobWebhook(Base):
    """The webhook that a job named, and the events that it asked for."""

    __tablename__ = "job_webhooks"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    webhook_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    events: Mapped[list[str]] = mapped_column(ARRAY(String(40)))


class DeliveryState(StrEnum):
    """`pending` until the receiver has answered 2xx, or all retries are used up."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(Base):
    """One event for one webhook, written in the transaction of the event and sent by the dispatcher."""

    __tablename__ = "deliveries"
    __table_args__ = (
        CheckConstraint(one_of("state", DeliveryState), name="state"),
        Index("uq_deliveries_webhook_id_event_id", "webhook_id", "event_id", unique=True),
        # For the sender: each webhook's first due delivery, however many wait behind it.
        Index("ix_deliveries_due", "webhook_id", "next_at", postgresql_where=text("state = 'pending'")),
        Index("ix_deliveries_webhook_id_id", "webhook_id", "id"),
        # For the deletion of a job.
        Index("ix_deliveries_job_id", text("(data ->> 'job_id')"), postgresql_where=text("data ? 'job_id'")),
        # A job's progress has one row, which is sent again and again: see jobs/events/progress.py.
        Index(
            "uq_deliveries_progress",
            "webhook_id",
            "job_id",
            unique=True,
            postgresql_where=text("type = 'job.progress'"),
        ),
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    webhook_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    job_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # of a job's events
    event_id: Mapped[str] = mapped_column(String(80))  # the same for all webhooks
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[Json] = mapped_column(JSONB)  # ids and states, no patient data
    state: Mapped[str] = mapped_column(String(20), default=DeliveryState.PENDING, server_default="pending")
    attempts: Mapped[int] = counter()
    status: Mapped[int | None] = mapped_column(Integer)  # of the latest response
    error: Mapped[str | None] = mapped_column(String(200))
    next_at: Mapped[dt.datetime] = time_of_insert()
    created_at: Mapped[dt.datetime] = time_of_insert()
    ended_at: Mapped[dt.datetime | None] = optional_time()
