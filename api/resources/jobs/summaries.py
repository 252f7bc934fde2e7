"""A prediction's summary as JSON or as a chart."""

import marshmallow as ma
from flask import Response
from marshmallow import fields

from api.http.responses import PNG, negotiate
from api.resources.jobs.schemas import CountsSchema
from api.views import charts
from jobs.results.queries import JobView
from jobs.results.summary import Summary


class ConfidenceSchema(ma.Schema):
    """Histograms of confidence by class. Bin i counts values from `edges[i]` to below `edges[i + 1]`."""

    edges = fields.List(fields.Float())
    counts = fields.Dict(keys=fields.String(), values=fields.List(fields.Integer()))


class SummarySchema(ma.Schema):
    """Summary of a prediction's results so far."""

    counts = fields.Nested(CountsSchema)
    classes = fields.Dict(
        keys=fields.String(), values=fields.Integer(), metadata={"description": "Scans by predicted class."}
    )
    dispositions = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "Scans by disposition: a class, indeterminate, rejected."},
    )
    confidence = fields.Nested(ConfidenceSchema)
    errors = fields.Dict(
        keys=fields.String(), values=fields.Integer(), metadata={"description": "Failed scans by error code."}
    )
    cached = fields.Integer(metadata={"description": "Results that were copied from earlier ones."})
    scans_per_second = fields.Float(allow_none=True)


def summary_response(view: JobView, found: Summary) -> Summary | Response:
    """The summary in the media type that the client accepts best."""
    if negotiate(PNG) != PNG:
        return found
    return Response(charts.draw_summary(view, found), mimetype=PNG)
