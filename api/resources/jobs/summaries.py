"""How a prediction's summary is shown: as JSON, or as a picture."""

import marshmallow as ma
from flask import Response
from marshmallow import fields

from api.http.responses import PNG, negotiate
from api.views import charts
from jobs.results.queries import JobView
from jobs.results.summary import Summary


class ConfidenceSchema(ma.Schema):
    """Histograms of confidence by class. Bin i holds what is at least `edges[i]` and below `edges[i + 1]`."""

    edges = fields.List(fields.Float())
    counts = fields.Dict(keys=fields.String(), values=fields.List(fields.Integer()))


class SummarySchema(ma.Schema):
    """A prediction's results so far, summed up."""

    counts = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "Scans by state: total, succeeded, failed, cancelled, pending."},
    )
    classes = fields.Dict(
        keys=fields.String(), values=fields.Integer(), metadata={"description": "Scans by label: every class."}
    )
    dispositions = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata={"description": "Scans by what may be done with them: a class, indeterminate, rejected."},
    )
    confidence = fields.Nested(ConfidenceSchema)
    errors = fields.Dict(keys=fields.String(), values=fields.Integer(), metadata={"description": "Scans by code."})
    cached = fields.Integer(metadata={"description": "Results that were known before."})
    scans_per_second = fields.Float(allow_none=True)


def answer(view: JobView, found: Summary) -> Summary | Response:
    """The summary in the kind that the client accepts best."""
    if negotiate(PNG) != PNG:
        return found
    return Response(charts.draw_summary(view, found), mimetype=PNG)
