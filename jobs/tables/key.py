"""Tables of API keys and idempotency keys."""

import datetime as dt
import uuid

from sqlalchemy import (
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
from jobs.tables.columns import Json, id_column, optional_time, tenant_column, time_of_insert

LOCATED = text("\"right\"(headers ->> 'Location'::text, 36)")
"""SQL: the id at the end of the address of what the request made."""


class ApiKey(Base):
    """An API key. Only the SHA-256 of its secret is stored: 256 random bits need no slow hash."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = tenant_column()
    name: Mapped[str] = mapped_column(String(200))
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(12))  # the first characters, to tell keys apart
    scopes: Mapped[list[str]] = mapped_column(ARRAY(String(40)))
    created_at: Mapped[dt.datetime] = time_of_insert()
    revoked_at: Mapped[dt.datetime | None] = optional_time()
    expires_at: Mapped[dt.datetime | None] = optional_time()  # null: never
    last_used_at: Mapped[dt.datetime | None] = optional_time()  # to the hour
    replaces: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # the key that it was rotated from


class IdempotencyKey(Base):
    """An Idempotency-Key: the request that it was sent with, and the first response once there is one."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index("ix_idempotency_keys_created_at", "created_at"),
        # For the deletion of what the response shows.
        Index("ix_idempotency_keys_location", LOCATED, postgresql_where=text("headers ? 'Location'")),
        Index("ix_idempotency_keys_made_id", "made_id", postgresql_where=text("made_id IS NOT NULL")),
    )

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))  # of the request: method, path, fields and files
    status: Mapped[int | None] = mapped_column(Integer)  # null: the first request is not answered yet
    headers: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    body: Mapped[str | None] = mapped_column(Text)
    made_id: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # the resource it made or changed, if not a job
    created_at: Mapped[dt.datetime] = time_of_insert()
    locked_at: Mapped[dt.datetime] = time_of_insert()
