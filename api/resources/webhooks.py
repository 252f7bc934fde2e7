"""Webhooks: create, list, delete; deliveries and redelivery.

They have the scopes of jobs: a webhook sends ids and states, which a key with these scopes may read anyway.
"""

import uuid
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.auth import needs
from api.http.bodies import Blueprint, accepts_body
from api.http.context import services, tenant, transaction
from api.http.fields import Answer, HttpUrl, List, Time, one_of
from api.http.idempotency import idempotent
from api.http.paging import PageQuery, PageSchema
from api.http.versioning import address
from jobs import addresses
from jobs.errors import Invalid
from jobs.events import deliveries, webhooks
from jobs.events.webhooks import EventType
from jobs.keys import Scope
from jobs.paging import Page
from jobs.states import JobKind
from jobs.tables import Delivery, DeliveryState

blueprint = Blueprint("webhooks", __name__, url_prefix="/webhooks", description="Webhooks and their deliveries.")


class WebhookRequest(ma.Schema):
    """A new webhook. Without `events` it receives all types that exist now."""

    url = HttpUrl(required=True)
    events = List(
        fields.String(validate=one_of(EventType)),
        load_default=lambda: list(map(str, EventType)),
        validate=validate.Length(1, len(EventType)),
    )
    kinds = fields.List(
        fields.String(validate=one_of(JobKind)),
        validate=validate.Length(1, len(JobKind)),
        metadata={"description": "Only events of such jobs; without it, of all. Events of models come anyway."},
    )


class WebhookSchema(Answer):
    """A webhook, without its secret. `events` is empty after its receiver has answered 410."""

    id = fields.UUID()
    url = fields.String()
    events = fields.List(fields.String(validate=one_of(EventType)))
    kinds = fields.List(
        fields.String(validate=one_of(JobKind)), allow_none=True, metadata={"description": "Of jobs; null: all."}
    )
    created_at = Time()


class NewWebhookSchema(WebhookSchema):
    """A webhook with its secret (Standard Webhooks), which is shown only once: null in a response repeated by its
    Idempotency-Key."""

    secret = fields.String(allow_none=True)


class WebhooksPage(PageSchema):
    """Webhooks, oldest first."""

    data = fields.List(fields.Nested(WebhookSchema), required=True)


class DeliverySchema(Answer):
    """An event sent to a webhook."""

    id = fields.UUID()
    type = fields.String(validate=one_of(EventType))
    event_id = fields.String(metadata={"description": "The header webhook-id: the same for each attempt."})
    state = fields.String(validate=one_of(DeliveryState))
    attempts = fields.Integer()
    status = fields.Integer(allow_none=True, metadata={"description": "HTTP status of the latest attempt."})
    error = fields.String(allow_none=True)
    next_at = Time(metadata={"description": "Time of the next attempt while it is pending."})
    created_at = Time()
    ended_at = Time(allow_none=True)


class DeliveriesPage(PageSchema):
    """Deliveries, newest first."""

    data = fields.List(fields.Nested(DeliverySchema), required=True)


@blueprint.route("", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@accepts_body(json=WebhookRequest)
@blueprint.response(201, NewWebhookSchema)
@blueprint.doc(operationId="createWebhook")
@idempotent(secrets=["secret"])
def create_webhook(body: dict[str, Any]) -> tuple[webhooks.Webhook, int, dict[str, str]]:
    """Create a webhook. Its secret is shown only now."""
    if why := addresses.webhook_url_error(body["url"], services().settings.receiver_hosts):
        raise Invalid(why, "/url")
    with transaction() as session:
        new = webhooks.create(session, tenant(), body["url"], body["events"], body.get("kinds"))
    return new, 201, {"Location": address(f"/webhooks/{new.id}")}


@blueprint.route("")
@needs(Scope.JOBS_READ)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, WebhooksPage)
@blueprint.doc(operationId="listWebhooks")
def list_webhooks(query: dict[str, Any]) -> Page[webhooks.Webhook]:
    """List webhooks, oldest first."""
    with transaction() as session:
        return webhooks.list_webhooks(session, tenant(), **query)


@blueprint.route("/<id:webhook_id>")
@needs(Scope.JOBS_READ)
@blueprint.response(200, WebhookSchema)
@blueprint.doc(operationId="getWebhook")
def get_webhook(webhook_id: uuid.UUID) -> webhooks.Webhook:
    """Show a webhook."""
    with transaction() as session:
        return webhooks.get(session, tenant(), webhook_id)


@blueprint.route("/<id:webhook_id>", methods=["DELETE"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(204)
@blueprint.doc(operationId="deleteWebhook")
def delete_webhook(webhook_id: uuid.UUID) -> None:
    """Delete a webhook with its deliveries."""
    with transaction() as session:
        webhooks.remove(session, tenant(), webhook_id)


@blueprint.route("/<id:webhook_id>/deliveries")
@needs(Scope.JOBS_READ)
@blueprint.arguments(PageQuery, location="query")
@blueprint.response(200, DeliveriesPage)
@blueprint.doc(operationId="listDeliveries")
def list_deliveries(query: dict[str, Any], webhook_id: uuid.UUID) -> Page[Delivery]:
    """List deliveries to a webhook, sent and pending, newest first."""
    with transaction() as session:
        return deliveries.list_deliveries(session, tenant(), webhook_id, **query)


@blueprint.route("/<id:webhook_id>/deliveries/<id:delivery_id>/redeliver", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(202, DeliverySchema)
@blueprint.doc(operationId="redeliver")
def redeliver(webhook_id: uuid.UUID, delivery_id: uuid.UUID) -> tuple[Delivery, int, dict[str, str]]:
    """Send a delivery again now, whatever its state."""
    with transaction() as session:
        found = deliveries.redeliver(session, tenant(), webhook_id, delivery_id)
    return found, 202, {"Location": address(f"/webhooks/{webhook_id}/deliveries"), "Retry-After": "1"}
