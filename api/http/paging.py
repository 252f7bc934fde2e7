"""Lists in pages: their queries and schemas."""

import marshmallow as ma
from marshmallow import fields, validate

BIGINT = 2**63 - 1


class PageSchema(ma.Schema):
    has_more = fields.Boolean(required=True)
    next = fields.String(required=True, allow_none=True, metadata={"description": "`after` of the next page."})


class PageQuery(ma.Schema):
    """A page of a list, by id."""

    limit = fields.Integer(load_default=50, validate=validate.Range(1, 100))
    after = fields.UUID(load_default=None, metadata={"description": "`next` of the previous page."})


class NumberedQuery(ma.Schema):
    """A page of a list, by number."""

    limit = fields.Integer(load_default=100, validate=validate.Range(1, 100))
    after = fields.Integer(load_default=None, validate=validate.Range(0, BIGINT))


class NamedQuery(ma.Schema):
    """A page of a list, by name."""

    limit = fields.Integer(load_default=100, validate=validate.Range(1, 100))
    after = fields.String(load_default="", metadata={"description": "`next` of the previous page."})
