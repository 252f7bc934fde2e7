"""`with running(unit_id)`: claim, heartbeat, cancel and drain watch, exception → state. The only place that does so."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs.queue import leases
from jobs.queue.leases import Claim
from worker.execution.heartbeat import watched
from worker.execution.resources import Resources
from worker.execution.unit import Claiming, UnitLease, is_away

log = structlog.get_logger()


@contextmanager
def running(
    unit_id: uuid.UUID, worker: str, resources: Resources, claim_next: Claiming | None = None
) -> Iterator[UnitLease | None]:
    """Hold the unit while the body runs; None where the claim is refused.

    The body ends the unit well by itself, in one transaction with its results (`lifecycle.succeed`).
    """
    lease = resources.settings.lease_seconds
    claim = claimed(resources, lambda session: leases.claim(session, unit_id, worker, lease))
    if claim is None:
        log.info("claim_refused", unit_id=str(unit_id))
        yield None
        return
    with holding(claim, resources, claim_next) as unit:
        yield unit


@contextmanager
def holding(claim: Claim, resources: Resources, claim_next: Claiming | None = None) -> Iterator[UnitLease]:
    """Hold a unit that is claimed. Whatever ends the body becomes a state here."""
    unit = UnitLease(claim, resources, claim_next)
    structlog.contextvars.bind_contextvars(job_id=str(claim.job_id), unit_id=str(claim.unit_id), attempt=claim.attempt)
    log.info("claimed", kind=claim.kind)
    try:
        with watched(unit):
            try:
                yield unit
                log.info("unit_done")
            except Exception as error:
                unit.end(error)
    finally:
        structlog.contextvars.unbind_contextvars("job_id", "unit_id", "attempt")


def claimed(resources: Resources, verb: Claiming) -> Claim | None:
    """Claim by the verb. None also where Postgres is away: the unit will be rung again."""
    for last in (False, True):
        try:
            with resources.claims.begin() as session:
                return verb(session)
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            if last:  # the first failure may only have found a connection that Postgres had closed
                log.warning("claim_failed", error=type(error).__name__)
    return None
