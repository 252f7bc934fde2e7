"""`with running(unit_id) as unit`: claim the unit, send heartbeats while the body runs, turn exceptions into states."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.queue import leases
from jobs.queue.leases import Claim
from worker.execution.heartbeat import sending_heartbeats
from worker.execution.resources import Resources
from worker.execution.unit import Claiming, UnitLease, is_away

log = structlog.get_logger()


@contextmanager
def running(
    unit_id: uuid.UUID, worker: str, resources: Resources, claim_next: Claiming | None = None
) -> Iterator[UnitLease | None]:
    """Hold the unit's lease while the body runs; yields None if the claim is refused.

    On success the body itself ends the unit, in one transaction with its results (`UnitLease.finish`).
    """
    lease = resources.settings.lease_seconds
    claim = claim_unit(resources, lambda session: leases.claim(session, unit_id, worker, lease))
    if claim is None:
        log.info("claim_refused", unit_id=str(unit_id))
        yield None
        return
    with holding(claim, resources, claim_next) as unit:
        yield unit


@contextmanager
def holding(claim: Claim, resources: Resources, claim_next: Claiming | None = None) -> Iterator[UnitLease]:
    """Hold the lease of a claimed unit. An exception of the body becomes the unit's state."""
    unit = UnitLease(claim, resources, claim_next)
    structlog.contextvars.bind_contextvars(job_id=str(claim.job_id), unit_id=str(claim.unit_id), attempt=claim.attempt)
    log.info("claimed", kind=claim.kind)
    try:
        with sending_heartbeats(unit):
            try:
                yield unit
                log.info("unit_done")
            except Exception as error:
                unit.end(error)
    finally:
        structlog.contextvars.unbind_contextvars("job_id", "unit_id", "attempt")


def claim_unit(resources: Resources, claim: Claiming) -> Claim | None:
    """Claim. Also None while Postgres is away: the unit will be dispatched again."""
    for last in (False, True):
        try:
            with resources.autocommit.begin() as session:
                return claim(session)
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            if last:  # the first failure may only be a connection that Postgres had closed
                log.warning("claim_failed", error=type(error).__name__)
    return None
