"""Tables of running totals, for metrics and the storage quota: nothing else is counted row by row."""

from sqlalchemy import BigInteger, Double, Identity, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from jobs.db import Base
from jobs.tables.columns import COUNTERS


def _total() -> Mapped[int]:
    return mapped_column(BigInteger, default=0, server_default="0")


def _seconds() -> Mapped[float]:
    return mapped_column(Double, default=0.0, server_default="0")


class JobCount(Base):
    """Ended jobs of a tenant by kind, final state and time in the queue (`jobs.monitoring.QUEUE_BOUNDS`). It is
    written with a job's end, and outlives the job."""

    __tablename__ = "job_counts"
    __table_args__ = ({"postgresql_with": COUNTERS},)

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    state: Mapped[str] = mapped_column(String(20), primary_key=True)
    bucket: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    jobs: Mapped[int] = _total()
    succeeded: Mapped[int] = _total()  # scans
    failed: Mapped[int] = _total()
    cancelled: Mapped[int] = _total()
    queue_seconds: Mapped[float] = _seconds()
    run_seconds: Mapped[float] = _seconds()


class UnitCount(Base):
    """Failed attempts of units by the job's kind and the error's code."""

    __tablename__ = "unit_counts"
    __table_args__ = ({"postgresql_with": COUNTERS},)

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    code: Mapped[str] = mapped_column(String(80), primary_key=True)
    retried: Mapped[int] = _total()
    ended: Mapped[int] = _total()


class RequestCount(Base):
    """Requests to the API by method, route, status and duration (`jobs.monitoring.LATENCY_BOUNDS`)."""

    __tablename__ = "request_counts"
    __table_args__ = ({"postgresql_with": COUNTERS},)

    method: Mapped[str] = mapped_column(String(10), primary_key=True)
    route: Mapped[str] = mapped_column(String(200), primary_key=True)
    status: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    bucket: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    requests: Mapped[int] = _total()
    seconds: Mapped[float] = _seconds()


class StorageChange(Base):
    """Bytes that a tenant stores more (or less) than before, by triggers on scans, datasets and uploads.

    A tenant's sum is what it stores. Rows are only added, so that nobody waits for another; `jobs.storage.usage` folds
    many rows into one.
    """

    __tablename__ = "storage_changes"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63), index=True)
    kind: Mapped[str] = mapped_column(String(20))
    bytes: Mapped[int] = mapped_column(BigInteger)
