"""Tables of webhooks and their deliveries."""

import datetime as dt
import uuid
from enum import StrEnum

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import Json, counter, id_column, one_of, optional_time, tenant_column, time_of_insert


class Webhook(Base):
    """A tenant's subscription to events. The secret is stored, since it signs each delivery (Standard Webhooks)."""

    __tablename__ = "webhooks"

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = tenant_column()
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(ARRAY(String(40)))
    secret: Mapped[str] = mapped_column(String(100))
    tried_at: Mapped[dt.datetime | None] = optional_time()  # the webhook that was tried longest ago is served first
    created_at: Mapped[dt.datetime] = time_of_insert()


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
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    webhook_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
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
