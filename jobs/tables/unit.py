"""The table of units of work."""

import datetime as dt
import uuid

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    Sequence,
    String,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.states import (
    UNIT_TERMINAL,
    Lane,
    UnitState,
)
from jobs.tables.columns import HOT_TABLE, Json, counter, id_column, one_of, optional_time, time_of_insert

FENCE = Sequence("unit_fence_seq", metadata=Base.metadata)
"""Each claim takes the next number. Later writes are guarded by the number of their claim."""


class Unit(Base):
    """What a worker claims at a time. A running unit is leased to the holder of its `fence`."""

    __tablename__ = "units"
    __table_args__ = (
        CheckConstraint(one_of("state", UnitState), name="state"),
        CheckConstraint(one_of("lane", Lane), name="lane"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="running_is_leased"),
        CheckConstraint(f"({one_of('state', UNIT_TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_is_terminal"),
        Index("uq_units_job_id_ordinal", "job_id", "ordinal", unique=True),
        # For the end of a job: whether any of its units is left.
        Index("ix_units_unfinished", "job_id", "ordinal", postgresql_where=text("finished_at IS NULL")),
        # For the dispatcher, in the order in which it reads: units that may be claimed, predictions first. Units that
        # wait for a time are in an index of their own.
        Index(
            "ix_units_claimable",
            "lane",
            "tenant_id",
            text("(explains IS NOT NULL)"),
            "job_id",
            "ordinal",
            postgresql_where=text("state IN ('queued', 'dispatched')"),
        ),
        Index("ix_units_scheduled", "not_before", postgresql_where=text("state = 'scheduled'")),
        Index("ix_units_dispatched", "lane", "dispatched_at", postgresql_where=text("state = 'dispatched'")),
        # For the reaper. No index has a column that a heartbeat writes: Postgres then updates the row within its page
        # and touches no index at all (HOT).
        Index("ix_units_running", "id", postgresql_where=text("state = 'running'")),
        # For the pace of a lane: ETAs, chunk sizes and reservations.
        Index("ix_units_succeeded", "lane", "finished_at", postgresql_where=text("state = 'succeeded'")),
        {"postgresql_with": HOT_TABLE},
    )

    id: Mapped[uuid.UUID] = id_column()
    tenant_id: Mapped[str] = mapped_column(String(63))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[str | None] = mapped_column(String(20))  # of its job; null: made by a release that did not write it
    ordinal: Mapped[int] = mapped_column(Integer)
    lane: Mapped[str] = mapped_column(String(20))
    scans: Mapped[int] = mapped_column(Integer, default=1, server_default="1")  # its size, for fair scheduling
    explains: Mapped[uuid.UUID | None] = mapped_column(Uuid)  # the unit whose results it explains; null: none
    state: Mapped[str] = mapped_column(String(20), default=UnitState.QUEUED)
    attempt: Mapped[int] = counter()
    failures: Mapped[int] = counter()
    rings: Mapped[int] = counter()  # messages sent since it was queued; 0 in the state dispatched: reserved
    fence: Mapped[int | None] = mapped_column(BigInteger)
    worker: Mapped[str | None] = mapped_column(String(200))
    not_before: Mapped[dt.datetime] = time_of_insert()
    dispatched_at: Mapped[dt.datetime | None] = optional_time()
    started_at: Mapped[dt.datetime | None] = optional_time()
    lease_expires_at: Mapped[dt.datetime | None] = optional_time()
    progress_at: Mapped[dt.datetime | None] = optional_time()
    yield_requested_at: Mapped[dt.datetime | None] = optional_time()  # set when other work should have this worker
    finished_at: Mapped[dt.datetime | None] = optional_time()
    done: Mapped[int | None] = mapped_column(Integer)  # its scans that the attempt that runs has computed
    warmup_seconds: Mapped[float | None] = mapped_column(Double)  # of an attempt, until its network was loaded
    expected_at: Mapped[dt.datetime | None] = optional_time()  # when the attempt that runs will end, by its worker
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
