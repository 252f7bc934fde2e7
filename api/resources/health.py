"""Liveness and readiness. Only Postgres is asked, where the dispatcher says whether it reaches Redis. In `renalq up` a
file says which processes do not run."""

from collections.abc import Sequence
from typing import Any

import marshmallow as ma
from flask import Response
from marshmallow import fields
from sqlalchemy.exc import SQLAlchemyError

from api.http.auth import public
from api.http.bodies import Blueprint
from api.http.context import services, transaction
from api.http.problems import RETRY_SECONDS, ProblemSchema, problem
from jobs import stack_state
from jobs.queue import processes
from jobs.states import Lane
from jobs.tables import Process

blueprint = Blueprint("health", __name__, url_prefix="/health", description="Liveness and readiness probes.")
NO_DATABASE = "database: Postgres does not answer."
LEAST_SECONDS = 15.0
"""A process seen within this time counts as alive, however short the heartbeat interval."""


class HealthSchema(ma.Schema):
    """Whether the stack works."""

    status = fields.String()
    reasons = fields.List(fields.String())


class ReadinessSchema(HealthSchema):
    """Whether jobs can be processed, and what does not run."""

    degraded = fields.List(
        fields.String(),
        required=True,
        metadata={
            "description": "Processes of `renalq up` that died and are being started again, such as MLflow. Those that "
            "jobs cannot do without are in `reasons` too, once they are missed."
        },
    )


@blueprint.route("/live")
@public
@blueprint.response(200, HealthSchema)
@blueprint.doc(operationId="live", security=[])
def live() -> dict[str, Any]:
    """Show that this process responds."""
    return {"status": "live", "reasons": []}


@blueprint.route("/ready")
@public
@blueprint.response(200, ReadinessSchema)
@blueprint.alt_response(503, schema=ProblemSchema, content_type="application/problem+json")
@blueprint.doc(operationId="ready", security=[])
def ready() -> dict[str, Any] | Response:
    """Show whether jobs can be accepted and processed; if not, why."""
    reasons, degraded = not_ready_reasons(), impairments()
    if not reasons:
        return {"status": "ready", "reasons": [], "degraded": degraded}
    headers, detail = {"Retry-After": str(RETRY_SECONDS)}, "Jobs cannot be done now. " + " ".join(reasons)
    return problem(503, "NOT_READY", detail, headers, reasons=reasons, degraded=degraded)


def impairments() -> list[str]:
    """The processes of `renalq up` that do not run, a sentence each; in containers none is known."""
    state = stack_state.read(services().settings.home)
    return [] if state is None else stack_state.impairments(state)


def not_ready_reasons() -> list[str]:
    """Reasons why jobs cannot be processed: database, broker, workers."""
    try:
        with transaction() as session:
            seen = processes.list_alive(session, max(LEAST_SECONDS, 3 * services().settings.process_seconds))
    except SQLAlchemyError:
        return [NO_DATABASE]
    return [*_broker(seen), *_workers(seen)]


def _broker(seen: Sequence[Process]) -> list[str]:
    dispatchers = [process for process in seen if process.kind == processes.DISPATCHER]
    if not dispatchers:
        return ["broker: no dispatcher lives, so nobody rings the workers."]
    reached = any(process.broker_reachable for process in dispatchers)
    return [] if reached else ["broker: the dispatcher cannot reach Redis."]


def _workers(seen: Sequence[Process]) -> list[str]:
    served = {lane for process in seen if process.kind == processes.WORKER for lane in process.lanes}
    return [f"worker: no live worker serves the lane {lane}." for lane in Lane if str(lane) not in served]
