"""The webhook of a single job, in the request that submits it."""

import base64
import binascii
from typing import Any

import marshmallow as ma
from marshmallow import fields, validate

from api.http.context import services
from api.http.fields import HttpUrl
from jobs import addresses
from jobs.errors import Invalid
from jobs.events.webhooks import JOB_ENDS, JOB_EVENTS, PREFIX, Receiver


def _check_secret(secret: str) -> None:
    try:
        length = len(base64.b64decode(secret.removeprefix(PREFIX), validate=True))
    except (binascii.Error, ValueError):
        length = 0
    if not secret.startswith(PREFIX) or not 24 <= length <= 64:
        raise ma.ValidationError(f"Must be {PREFIX} and base64 of 24 to 64 random bytes (Standard Webhooks).")


class NamesReceiver(ma.Schema):
    """The fields of a request that may name a webhook for its own job."""

    webhook = HttpUrl(metadata={"description": "Where this job's events go, beside the webhooks of POST /webhooks."})
    webhook_events = fields.List(
        fields.String(validate=validate.OneOf([str(type_) for type_ in JOB_EVENTS])),
        validate=validate.Length(1, len(JOB_EVENTS)),
        metadata={"description": "Which of them; without it, how the job has ended."},
    )
    webhook_secret = fields.String(
        validate=[validate.Length(max=100), _check_secret],
        metadata={"description": "Signs them as Standard Webhooks says; without it they are not signed."},
    )

    @ma.validates_schema
    def _has_address(self, data: dict[str, Any], **kwargs: Any) -> None:
        for name in ("webhook_events", "webhook_secret"):
            if name in data and "webhook" not in data:
                raise ma.ValidationError("Give webhook as well: the address.", name)


def receiver_of(body: dict[str, Any]) -> Receiver | None:
    """The receiver that a checked body names, if its address is one that webhooks are sent to.

    Raises:
        Invalid
    """
    if "webhook" not in body:
        return None
    if why := addresses.webhook_url_error(body["webhook"], services().settings.receiver_hosts):
        raise Invalid(why, "/webhook")
    return Receiver(body["webhook"], body.get("webhook_secret", ""), body.get("webhook_events", JOB_ENDS))
